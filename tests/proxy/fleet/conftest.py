"""A watched fleet over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.watch import Watch
from proxy_addon.settings import Settings
from tests.fakes.ollama_node import FakeOllama


async def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return once ``holds()``; what it looks at changes without telling anybody."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


@dataclass
class Watched:
    fleet: Fleet
    watch: Watch
    lost: list[tuple[str, str]] = field(default_factory=list)


WatchFactory = Callable[..., Watched]


@pytest.fixture
async def watched() -> AsyncIterator[WatchFactory]:
    """Give a factory: ``watched(node, …, poll={…}, agents={node: url})`` starts to watch these nodes."""
    made: list[Watched] = []
    # The time of the whole answer is set by every poll; the connector must not limit a fleet.
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    def start(
        *nodes: FakeOllama, agent_url: str | None = None, proxy_id: str = "proxy-1", **settings: Any
    ) -> Watched:
        poll = {"interval_s": 0.05, "timeout_s": 0.4, **settings.pop("poll", {})}
        discovery = {"agents": False, **settings.pop("discovery", {})}
        fleet = Fleet()
        for fake in nodes:
            fleet.add(Node("127.0.0.1", fake.server.port, agent_url=agent_url))
        tree = Settings.model_validate({"poll": poll, "discovery": discovery, **settings})
        found = Watched(fleet, Watch(fleet, tree, lambda: session, proxy_id))
        fleet.on_lost.append(lambda node, reason: found.lost.append((node.name, reason)))
        found.watch.start()
        made.append(found)
        return found

    yield start
    for found in made:
        await found.watch.stop()
        assert found.watch.errors == 0
    await session.close()
