"""Three unlike nodes behind the real proxy, and what they say afterwards about what reached them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.fakes.exchange import Received
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import FakeModel, embedding_model
from tests.proxy.running import RunningProxy

CHAT = "llama3.2"
EMBED = "nomic-embed-text"
LONE = "qwen3"  #: on one node only
REMOTE = FakeModel("gemma3:270m", size=4_000_000)  #: what a pull can bring


@dataclass
class House:
    """The nodes, the proxy, and what came through."""

    nodes: list[FakeOllama]
    proxy: RunningProxy

    @property
    def url(self) -> str:
        return self.proxy.url

    def reached(self, path: str, method: str = "POST") -> list[tuple[FakeOllama, Received]]:
        """Every request of ``path`` on any node, each as a node must see it: its own Host, no Origin."""
        found = [(node, got) for node in self.nodes for got in node.requests(path, method)]
        for node, got in found:
            assert got.header("host") == node.host_port
            assert got.header("origin") is None
        return found

    def only(self, path: str, method: str = "POST", sent: Sent | None = None) -> Received:
        """The one request of ``path``, which one node got once, as it was the last of ``sent``."""
        [(node, got)] = self.reached(path, method)
        if sent is not None:
            sent.is_what(node, got)
        return got

    async def wait_one(self, path: str, chunks: int = 0) -> tuple[FakeOllama, Received]:
        """The request of ``path`` once a node has it and has sent ``chunks`` chunks of its answer."""
        for_any = self.nodes[0].server.notice

        def there() -> bool:
            return any(got.chunks >= chunks for node in self.nodes for got in node.requests(path))

        for node in self.nodes[1:]:
            node.server.notice = for_any
        await for_any.until(there)
        [found] = self.reached(path)
        return found

    def at(self, mode: str) -> str:
        """``host:port`` of one of the proxy's modes (``regular``, ``socks5``)."""
        servers = self.proxy.master.addons.get("proxyserver").servers
        [(host, port)] = [server.listen_addrs[0][:2] for server in servers if server.mode.type_name == mode]
        return f"{host}:{port}"


@asynccontextmanager
async def open_house(**settings: Any) -> AsyncIterator[House]:
    """Start nodes and proxy; ``settings`` are the proxy's. A node's own failure is the test's."""
    async with AsyncExitStack() as stack:
        stored = [[CHAT, embedding_model(EMBED)], [CHAT, embedding_model(EMBED)], [CHAT, LONE]]
        nodes = [
            await stack.enter_async_context(FakeOllama(models, remote=[REMOTE], num_parallel=2))
            for models in stored
        ]
        yield House(nodes, await stack.enter_async_context(RunningProxy(nodes, **settings)))


class Sent:
    """Remembers what an httpx client put on the wire; ``hooks`` is the client's ``event_hooks``."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.heads: list[dict[str, str]] = []
        self.answers: list[Mapping[str, str]] = []

    def hooks(self, *, asynchronous: bool = True) -> dict[str, list[Any]]:
        async def request(given: httpx.Request) -> None:
            self._request(given)

        async def response(given: httpx.Response) -> None:
            self._response(given)

        if asynchronous:
            return {"request": [request], "response": [response]}
        return {"request": [self._request], "response": [self._response]}

    def _request(self, given: httpx.Request) -> None:
        self.bodies.append(given.content if hasattr(given, "_content") else b"")
        self.heads.append(dict(given.headers))

    def _response(self, given: httpx.Response) -> None:
        self.answers.append({name.lower(): value for name, value in given.headers.items()})

    def is_what(self, node: FakeOllama, got: Received) -> None:
        """Assert that ``node`` got the last request as it was sent: every byte, and every header but two.

        Host is the node's, and what a client says of its connection goes no further than the proxy.
        """
        sent = {name: value for name, value in self.heads[-1].items() if name != "connection"}
        at_node = {name.lower(): value for name, value in got.headers}
        added = {name: at_node.pop(name) for name in list(at_node) if name not in sent}
        assert set(added) <= {"x-sollol-hops"}
        assert at_node == {**sent, "host": node.host_port}
        assert got.body == self.bodies[-1]
