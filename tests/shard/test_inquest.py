"""Who made a model end is asked before the leases that could tell are given back."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import cast

from agent.lease import Lease
from agent.report import ShardPlan
from shard.llama_server import Launch
from shard.sharded_server import ShardedServer

PLAN = ShardPlan.model_construct(id="a-plan", ms_per_token=1.0, shares=[])


class Told:
    """What ShardedServer needs of a Lease; one that is closed hears nothing any more."""

    direct = False
    latest = None
    received_bytes = 0

    def __init__(self) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()

    def hears(self, reason: str) -> None:
        if not self.closed.is_set():
            self.lost.set_result(reason)

    async def close(self) -> None:
        self.closed.set()


async def over(*leases: Told) -> ShardedServer:
    process = await asyncio.create_subprocess_exec("true", stdout=asyncio.subprocess.PIPE)
    sockets = tempfile.TemporaryDirectory()
    server = ShardedServer(Launch(Path("a.gguf"), 8), process, sockets, time.monotonic())
    places = {(f"node-{number}", "CPU"): cast(Lease, lease) for number, lease in enumerate(leases)}
    server.adopt(PLAN, places)
    await server.exited
    return server


async def test_llama_server_ends_before_a_lease_tells_why() -> None:
    first, second = Told(), Told()
    server = await over(first, second)
    stopping = asyncio.create_task(server.stop())
    # Whatever can run without the news has run.
    for _ in range(100):
        await asyncio.sleep(0)
    assert not first.closed.is_set()
    assert not second.closed.is_set()
    second.hears("its rpc-server is gone")
    await stopping
    assert server.culprit == ("node-1", "its rpc-server is gone")
    assert await server.inquest() == server.culprit
    assert first.closed.is_set()
    assert second.closed.is_set()
