"""One proxy for a module of attacks, with the lane and without, before a node whose traffic is tapped."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from tests.fakes.ollama_node import FakeOllama
from tests.hostile.wire import Tap, tapped
from tests.proxy.running import RunningProxy, with_slots

#: So short that a test of a slow client takes a second, and long beside what the machine needs.
LIMITS = {"head_s": 1, "body_s": 1, "keepalive_s": 3}
SLOTS = 8  #: so that a stream that hangs keeps nobody from a slot
POLLS = frozenset(("/api/version", "/api/tags", "/api/ps", "/api/show", "/"))
CHAT = {
    "model": "llama3.2",
    "stream": False,
    "messages": [{"role": "user", "content": "[[id:good]] [[n:3]] hi"}],
}


@dataclass
class House:
    """A node, the tap before it, the proxy before that, and a well-behaved client."""

    node: FakeOllama
    tap: Tap
    proxy: RunningProxy
    session: aiohttp.ClientSession
    way: str  #: "lane", or mitmproxy's "layers"

    async def answers_well(self) -> None:
        """Whoever behaves is served, whatever others do."""
        async with self.session.post(f"{self.proxy.url}/api/chat", json=CHAT) as answer:
            said = await answer.json()
        assert (answer.status, said["message"]["content"]) == (200, " good-0 good-1 good-2"), said

    def reached(self) -> list[tuple[str, str]]:
        """What the node was sent since the last look, but for polls and the well-behaved; read strictly."""
        sent = self.tap.requests()
        self.tap.forget()
        return [
            (method, path) for method, path, body in sent if path not in POLLS and b"[[id:good]]" not in body
        ]


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=["lane", "layers"])
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with (
        FakeOllama(num_parallel=SLOTS, time_scale=0.01) as node,
        tapped(node.server.port) as tap,
        RunningProxy(
            [with_slots(tap, SLOTS)],
            splice=request.param == "lane",
            timeouts=LIMITS,
            poll={"timeout_s": 5},  # what floods the proxy here floods the loop that the node runs on, too
        ) as proxy,
        # Of kept connections the proxy would now and then close one just when it is used again.
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
    ):
        yield House(node, tap, proxy, session, request.param)
