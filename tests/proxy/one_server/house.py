"""OneServer before real fake nodes: flows go through its hooks as the chain would call them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from mitmproxy import http
from mitmproxy.test import tflow, tutils

from agent.ollama import names
from agent.ollama.client import parse_ps, parse_tags
from proxy_addon import ask, record
from proxy_addon.endpoints import match, protocol_of
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.one_server.addon import OneServer
from proxy_addon.record import Record
from proxy_addon.settings import Settings
from tests.fakes.ollama_node import FakeOllama


async def _settled(rest: Awaitable[None] | None) -> None:
    """What is left to do of a hook, if anything is."""
    if rest is not None:
        await rest


class House:
    """A fleet of fakes and the OneServer in front of it."""

    def __init__(
        self, fakes: Iterable[FakeOllama], session: aiohttp.ClientSession, settings: Settings
    ) -> None:
        self.fleet = Fleet()
        self.session = session
        self.refreshed: list[str] = []
        for fake in fakes:
            self.fleet.add(Node(fake.server.host, fake.server.port))
        self.server = OneServer(self.fleet, settings, lambda: session, self.refresh)

    def node(self, fake: FakeOllama) -> Node:
        """What the fleet knows of ``fake``."""
        return self.fleet.nodes[fake.host_port]

    def down(self, fake: FakeOllama, why: str = "connection refused") -> None:
        """The polls of ``fake`` fail."""
        self.node(fake).poll_error = why

    async def refresh(self, nodes: Iterable[Node]) -> None:
        """Read the inventory of ``nodes`` as the polls do."""
        for node in nodes:
            self.refreshed.append(node.name)
            async with (
                self.session.get(f"{node.url}/api/tags") as tags,
                self.session.get(f"{node.url}/api/ps") as ps,
            ):
                node.models = {names.canonical(row.name): row for row in parse_tags(await tags.read())}
                node.resident = {names.canonical(row.name): row for row in parse_ps(await ps.read())}
            node.polled_s, node.version = 0.0, "0.33.0"

    def flow(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Iterable[tuple[str, str]] = (),
        client: str = "10.9.9.9",
    ) -> tuple[http.HTTPFlow, Record]:
        """A flow as it is when its head was read."""
        content = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        fields = [("host", "fleet.internal"), *headers]
        head = http.Headers([(name.encode(), text.encode()) for name, text in fields])
        flow = tflow.tflow(
            req=tutils.treq(method=method.encode(), path=path.encode(), content=content, headers=head)
        )
        flow.client_conn.peername = (client, 50000)
        rec = record.open_for(flow, protocol_of(path), asyncio.get_running_loop().time())
        rec.endpoint = match(path.partition("?")[0])
        return flow, rec

    async def run(self, flow: http.HTTPFlow, rec: Record) -> None:
        """Call the hooks of a request, in the chain's order."""
        await _settled(self.server.requestheaders(flow))
        if flow.response or flow.request.stream:
            return
        assert rec.endpoint
        rec.ask = ask.parse(
            rec.endpoint,
            flow.request.path.partition("?")[0],
            flow.request.headers,
            flow.request.raw_content or b"",
            "",
        )
        await _settled(self.server.request(flow))

    async def ask(self, method: str, path: str, body: Any = None, **more: Any) -> http.Response:
        """The answer to a request that is not streamed; a forwarded one is carried to its node."""
        flow, rec = self.flow(method, path, body, **more)
        await self.run(flow, rec)
        if rec.placed:
            await self.carry(flow)
        assert flow.response and rec.stream is None
        return flow.response

    async def carry(self, flow: http.HTTPFlow) -> None:
        """Do what mitmproxy does with a flow that was sent to a node."""
        url = f"http://{flow.request.host}:{flow.request.port}{flow.request.path}"
        async with self.session.request(flow.request.method, url, data=flow.request.raw_content) as answer:
            flow.response = http.Response.make(answer.status, await answer.read())
        await _settled(self.server.response(flow))

    async def stream(self, method: str, path: str, body: Any = None, **more: Any) -> list[dict[str, Any]]:
        """The rows of an answer that must come as a stream."""
        flow, rec = self.flow(method, path, body, **more)
        await self.run(flow, rec)
        assert flow.response is None and rec.stream
        assert rec.stream.head.status_code == 200
        assert rec.stream.head.headers["content-type"] == "application/x-ndjson"
        return [orjson.loads(line) async for line in rec.stream.chunks]


@asynccontextmanager
async def house(*fakes: FakeOllama, **settings: Any) -> AsyncIterator[House]:
    """A house whose fleet has looked at every node once."""
    async with aiohttp.ClientSession() as session:
        made = House(fakes, session, Settings.model_validate(settings))
        await made.refresh(made.fleet)
        made.refreshed.clear()
        yield made


def said(response: http.Response) -> Any:
    """The JSON of a response."""
    return orjson.loads(response.content or b"null")
