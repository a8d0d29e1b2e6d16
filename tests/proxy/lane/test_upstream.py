"""Connections to nodes: what they make of answers of all kinds, and which of them are used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from mitmproxy.connection import Server

from proxy_addon.lane.pool import Pool
from proxy_addon.lane.upstream import ClientLeft, Lost, Upstream

ASK = b"GET / HTTP/1.1\r\nhost: node\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Serve = Callable[[bytes], Awaitable[Upstream]]


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
async def serve(pool: Pool) -> AsyncIterator[Serve]:
    """Connect to a node that answers each request with these bytes, and closes behind ``CLOSE``."""
    servers: list[asyncio.Server] = []

    async def make(answer: bytes) -> Upstream:
        async def node(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(4096):
                said, closes, _ = answer.partition(b"CLOSE")
                writer.write(said)
                if closes:
                    break
            writer.close()

        servers.append(await asyncio.start_server(node, "127.0.0.1", 0))
        return await pool.connect(Server(address=servers[-1].sockets[0].getsockname()), 5)

    yield make
    for server in servers:
        server.close()


async def whole(upstream: Upstream, method: str = "GET") -> tuple[int, bytes]:
    upstream.send(ASK)
    answer = await upstream.head(method)
    body = b""
    while not upstream.ended:
        body += await upstream.payload()
    return answer.response.status_code, body


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (OK, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\nX: y\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\n\r\nokCLOSE", False),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", True),
        (OK + b"and more than was asked for", False),
    ],
    ids=["length", "chunks", "trailers", "interim", "close", "1.0", "until close", "no reason", "surplus"],
)
async def test_an_answer_is_read_to_its_end(pool: Pool, serve: Serve, answer: bytes, kept: bool) -> None:
    upstream = await serve(answer)
    async with asyncio.timeout(10):
        assert await whole(upstream) == (200, b"ok")
    address = upstream.server.address
    assert address
    pool.give(upstream)
    again = pool.take(address)
    assert (again is upstream) == kept
    if again:
        assert again.used
        assert await whole(again) == (200, b"ok")


async def test_a_head_alone_is_the_whole_answer_to_head(serve: Serve) -> None:
    async with asyncio.timeout(10):
        assert await whole(await serve(OK.removesuffix(b"ok")), "HEAD") == (200, b"")


@pytest.mark.parametrize(
    "answer",
    [
        b"CLOSE",
        b"HTTP/1.1 200 OK\r\nContent-LenCLOSE",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nokCLOSE",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nCLOSE",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
async def test_an_answer_that_is_none_is_the_nodes_failure(serve: Serve, answer: bytes) -> None:
    with pytest.raises(Lost):
        async with asyncio.timeout(10):
            await whole(await serve(answer))


async def test_a_node_that_speaks_out_of_turn_is_not_asked_again(pool: Pool) -> None:
    spoke = asyncio.Event()

    async def node(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(OK)
        await spoke.wait()
        writer.write(OK)  # an answer to nothing: the next request must not get it
        await reader.read()
        writer.close()

    async with await asyncio.start_server(node, "127.0.0.1", 0) as server, asyncio.timeout(10):
        address = server.sockets[0].getsockname()
        upstream = await pool.connect(Server(address=address), 5)
        await whole(upstream)
        pool.give(upstream)
        gone = asyncio.Event()
        upstream._on_gone = lambda _, told=upstream._on_gone: (told(_), gone.set())  # type: ignore[assignment]
        spoke.set()
        await gone.wait()
        assert pool.take(address) is None


async def test_a_client_that_leaves_ends_the_wait(serve: Serve) -> None:
    upstream = await serve(b"")
    upstream.send(ASK)
    waiting = asyncio.ensure_future(upstream.head("GET"))
    await asyncio.sleep(0)
    upstream.interrupt()
    with pytest.raises(ClientLeft):
        await waiting


async def test_a_client_that_leaves_between_two_pieces_ends_the_next_wait(serve: Serve) -> None:
    upstream = await serve(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart")
    upstream.send(ASK)
    await upstream.head("GET")
    assert await upstream.payload() == b"part"
    upstream.interrupt()
    with pytest.raises(ClientLeft):
        async with asyncio.timeout(10):
            await upstream.payload()
