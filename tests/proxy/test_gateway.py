"""Guard, admin, journal and metrics on the real proxy: what clients see on the wire and what nodes get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
import pytest

from tests.fakes.faults import trickle
from tests.fakes.ollama_node import FakeOllama
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "[[id:x]] [[n:3]] hi"}]}


@pytest.fixture
async def node() -> AsyncIterator[FakeOllama]:
    async with FakeOllama() as node:
        yield node


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def raw(port: int, data: bytes) -> bytes:
    """Send bytes as they are, read until the head and a body of the announced length are there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            return head + await reader.readexactly(int(fields.get(b"content-length", b"0")))
    finally:
        writer.close()


def worked(node: FakeOllama) -> list[str]:
    """What the node was asked besides polls."""
    polls = ("/api/version", "/api/tags", "/api/ps", "/api/show", "/")
    return [request.path for request in node.received if request.path not in polls]


async def test_a_request_is_journalled_counted_and_explained(
    node: FakeOllama, session: aiohttp.ClientSession
) -> None:
    async with RunningProxy([node]) as proxy:
        async with session.post(f"{proxy.url}/api/chat", json=CHAT) as response:
            request_id = response.headers["x-sollol-request-id"]
            await response.read()
        made = await (await session.get(f"{proxy.url}/sollol/explain/{request_id}")).json()
        assert (made["outcome"], made["status"], made["node"]) == ("ok", 200, node.host_port)
        assert made["decisions"][0]["node"] == node.host_port
        assert [attempt["outcome"] for attempt in made["attempts"]] == ["ok"]
        assert made["stats"]["output_tokens"] == 3
        text = await (await session.get(f"{proxy.url}/metrics")).text()
        labels = f'host="{node.host_port}",model="llama3.2:latest",status="success"'
        assert f"sollol_requests_total{{{labels}}} 1.0" in text
        assert f'sollol_node_health{{host="{node.host_port}"}} 1.0' in text
        dashboard = await (await session.get(f"{proxy.url}/api/dashboard")).json()
        assert (dashboard["status"], dashboard["total_requests"]) == ("healthy", 1)
        assert dashboard["hosts"][0]["requests_handled"] == 1


async def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(node: FakeOllama) -> None:
    async with RunningProxy([node], guard={"body_limit_bytes": 1000}) as proxy:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
        answer = await raw(proxy.port, head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": "the request body is larger than 1000 bytes (guard.body_limit_bytes)"
    }
    assert worked(node) == []


async def test_a_body_that_grows_too_large_is_refused_while_it_comes(node: FakeOllama) -> None:
    async with RunningProxy([node], guard={"body_limit_bytes": 1000}) as proxy:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await raw(proxy.port, head + b"400\r\n" + b"x" * 1024 + b"\r\n")  # and never its end
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert worked(node) == []


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"Host: evil.example\r\n", 403),
        (b"Host: localhost\r\nOrigin: https://evil.example\r\n", 403),
        (b"Host: localhost\r\nTrailer: x\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Host: localhost\r\nTransfer-Encoding: gzip, chunked\r\n", 501),
        (b"Host: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Host: localhost\r\nContent-Length: x\r\n", 400),
    ],
)
async def test_what_is_refused_reaches_no_node(node: FakeOllama, fields: bytes, status: int) -> None:
    async with RunningProxy([node]) as proxy:
        answer = await raw(proxy.port, b"POST /api/chat HTTP/1.1\r\n" + fields + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert worked(node) == []


async def test_a_page_that_may_ask_gets_cors_from_the_proxy(
    node: FakeOllama, session: aiohttp.ClientSession
) -> None:
    origin = "http://localhost:3000"
    async with RunningProxy([node]) as proxy:
        url = f"{proxy.url}/api/chat"
        asks = {"origin": origin, "access-control-request-method": "POST"}
        async with session.options(url, headers=asks) as preflight:
            assert preflight.status == 204
            assert preflight.headers["access-control-allow-origin"] == origin
        async with session.post(url, json=CHAT, headers={"origin": origin}) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert b'"done":true' in await response.read()
        async with session.get(f"{proxy.url}/api/tags", headers={"origin": origin}) as response:
            assert response.headers["access-control-allow-origin"] == origin
    [got] = node.requests("/api/chat")
    assert got.header("origin") is None
    assert got.header("host") == node.host_port


async def test_the_proxy_port_takes_what_is_for_the_fleet(
    node: FakeOllama, session: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    through = f"http://127.0.0.1:{unused_tcp_port}"
    async with RunningProxy([node], modes=[f"regular@127.0.0.1:{unused_tcp_port}"]):
        async with session.post(f"{node.url}/api/chat", json=CHAT, proxy=through) as response:
            assert response.status == 200
            assert response.headers["x-sollol-node"] == node.host_port
            assert b'"done":true' in await response.read()
        async with session.get("http://example.com/", proxy=through) as response:
            assert response.status == 403
            assert (await response.json())["error"] == (
                f"only plain HTTP to the nodes of the fleet ({node.host_port}) is served, not example.com:80"
            )
        answer = await raw(unused_tcp_port, b"CONNECT %s HTTP/1.1\r\n\r\n" % node.host_port.encode())
        assert answer.startswith(b"HTTP/1.1 403 ")
    assert len(node.requests("/api/chat")) == 1


@asynccontextmanager
async def relay(to_port: int) -> AsyncIterator[int]:
    """A port that leads to another one, as a forwarded one does; the proxy cannot know it for its own."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", to_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_proxy_that_is_its_own_node_does_not_go_round(
    node: FakeOllama, session: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    """The node's port leads back to the proxy: polls and requests are told apart from those of clients."""
    async with relay(unused_tcp_port) as back:
        itself = f"127.0.0.1:{back}"
        listen = f"127.0.0.1:{unused_tcp_port}"
        async with RunningProxy([itself, node], listen=listen, placement="round_robin") as proxy:
            rows = (await (await session.get(f"{proxy.url}/sollol/status")).json())["nodes"]
            states = {row["name"]: (row["state"], row["why"]) for row in rows}
            assert states[node.host_port] == ("up", None)
            assert states[itself] == ("down", "it is this proxy itself under another address")
            for _ in range(3):
                async with session.post(f"{proxy.url}/api/chat", json=CHAT) as response:
                    assert response.headers["x-sollol-node"] == node.host_port
                    await response.read()
            sent = node.requests("/api/chat")
            assert len(sent) == 3
            headers = {"x-sollol-hops": sent[0].header("x-sollol-hops") or ""}
            async with session.post(f"{proxy.url}/api/chat", json=CHAT, headers=headers) as response:
                assert response.status == 508
                assert "one of its nodes is the proxy itself" in (await response.json())["error"]
            assert len(node.requests("/api/chat")) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_reads_that_a_model_has_been_made_finds_it(
    node: FakeOllama, session: aiohttp.ClientSession, stream: bool
) -> None:
    """Clients go on at the last line, not at the body's end."""
    async with RunningProxy([node], poll={"interval_s": 60.0}) as proxy, aiohttp.ClientSession() as another:
        node.fail(trickle(200, 0.02, path="/api/tags", times=None))
        for name in ("one", "two"):
            asked = {"model": name, "from": "llama3.2", "system": "Arr.", "stream": stream}
            async with session.post(f"{proxy.url}/api/create", json=asked) as made:
                async for line in made.content:
                    if b"success" in line:
                        break
                async with another.post(f"{proxy.url}/api/chat", json=CHAT | {"model": name}) as answer:
                    assert answer.status == 200, await answer.text()
