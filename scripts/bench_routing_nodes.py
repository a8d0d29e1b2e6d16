"""A trace's nodes in a process of their own, and the wire to it.

Every run has a fresh process: nothing is left of the one before. Its first line of output says where the
nodes and it itself answer; it ends when its input does.

    python scripts/bench_routing_nodes.py TRACE SEED SPEED
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
from aiohttp import web
from bench_routing_clock import run
from bench_routing_subjects import ROOT, Broken, Place, environment

from tests.sim.fleet import SimFleet
from tests.sim.trace import Event, Trace
from tests.sim.traces import TRACES

#: Tokens, after an answer's first, that a node sends at a time: with one by one the programs would be what is
#: measured. It is the same for everybody.
TOKEN_BATCH = 4
START_LIMIT_S = 30.0
ASKED = ("/api/chat", "/api/embed")


class Stage:
    """The nodes' side: what the driver may ask of them."""

    def __init__(self, fleet: SimFleet) -> None:
        self._fleet = fleet
        self._befalling: set[asyncio.Task[None]] = set()
        for node in fleet.nodes:
            node.spec.token_batch = TOKEN_BATCH
            node.server.received = deque()

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_post("/begin", self.begin)
        app.router.add_get("/seen", self.seen)
        return app

    async def begin(self, _: web.Request) -> web.Response:
        """The trace begins now: what befalls the nodes is counted from here."""
        for event in self._fleet.trace.events:
            self._befalling.add(asyncio.create_task(self._befall(event)))
        return web.Response()

    async def _befall(self, event: Event) -> None:
        await asyncio.sleep(event.at_s)
        await self._fleet.befall(event)

    async def seen(self, _: web.Request) -> web.Response:
        """What the nodes did."""
        nodes = self._fleet.nodes
        return web.json_response({
            "loads": [len(node.scheduler.loads) for node in nodes],
            "received": [sum(len(node.requests(path)) for path in ASKED) for node in nodes],
        })  # fmt: skip


async def serve(trace: Trace) -> None:
    async with SimFleet(trace, time_scale=1.0) as fleet:
        runner = web.AppRunner(Stage(fleet).app(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        places = [
            Place(node.host_port, agent.url, node.spec.num_parallel)
            for node, agent in zip(fleet.nodes, fleet.agents, strict=True)
        ]
        said = {"url": f"http://{host}:{port}", "places": [asdict(place) for place in places]}
        print(json.dumps(said), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await runner.cleanup()


@dataclass(frozen=True)
class Nodes:
    """The driver's side of a running process of nodes."""

    pid: int
    places: list[Place]
    url: str
    session: aiohttp.ClientSession

    async def begin(self) -> None:
        """Let the trace begin."""
        async with self.session.post(f"{self.url}/begin") as answer:
            answer.raise_for_status()

    async def seen(self) -> dict[str, list[int]]:
        """Loads and requests of each node so far."""
        async with self.session.get(f"{self.url}/seen") as answer:
            seen: dict[str, list[int]] = await answer.json()
            return seen


@contextlib.asynccontextmanager
async def started(trace: str, seed: int, speed: float) -> AsyncIterator[Nodes]:
    """Start the nodes of a trace, and end them. Raises Broken if they do not start."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, trace, str(seed), str(speed), cwd=ROOT, env=environment(),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        async with asyncio.timeout(START_LIMIT_S * speed):
            line = await process.stdout.readline()
        if not line:
            raise Broken("the simulated nodes did not start; their own words are above")
        said: dict[str, Any] = json.loads(line)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            yield Nodes(process.pid, [Place(**place) for place in said["places"]], said["url"], session)
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    run(serve(TRACES[sys.argv[1]](int(sys.argv[2]))), float(sys.argv[3]))
