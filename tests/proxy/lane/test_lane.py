"""The lane as clients and nodes see it: kept connections, pipelines, heads, what it leaves to the layers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.raw import request_bytes
from tests.fakes.tokens import check_stream
from tests.proxy.running import RunningProxy

VERSION = request_bytes("/api/version")


def chat(tag: str, stream: bool = True, **headers: str) -> bytes:
    body = {"model": "llama3.2", "prompt": f"[[id:{tag}]] [[n:5]]", "stream": stream}
    return request_bytes("/api/generate", body, **headers)


class Client:
    """A kept connection on which any bytes may be sent, and whose answers are read one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, proxy: RunningProxy) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", proxy.port))

    async def answer(self, bare: bool = False) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if bare:
            return int(status.split()[1]), fields, body
        if fields.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            body = await self.reader.readexactly(int(fields.get("content-length", "0")))
        return int(status.split()[1]), fields, body


def text_of(body: bytes) -> str:
    return "".join(orjson.loads(line)["response"] for line in body.splitlines())


@pytest.fixture
async def node(ollama_node: NodeFactory) -> FakeOllama:
    return await ollama_node()


@pytest.fixture
async def proxy(node: FakeOllama) -> AsyncIterator[RunningProxy]:
    async with RunningProxy([node]) as running, asyncio.timeout(30):
        yield running


async def test_a_pipeline_is_answered_in_order(proxy: RunningProxy) -> None:
    client = await Client.to(proxy)
    client.writer.write(b"".join([chat("a"), VERSION, chat("b", stream=False), VERSION * 300, chat("c")]))
    for tag, plain in (("a", 1), ("b", 300), ("c", 0)):
        status, _, body = await client.answer()
        assert status == 200
        assert check_stream(text_of(body), f"[[id:{tag}]] [[n:5]]") == 5
        for _ in range(plain):
            assert orjson.loads((await client.answer())[2])["version"]


async def test_clients_share_the_connections_to_a_node(proxy: RunningProxy, node: FakeOllama) -> None:
    accepted = 0
    for tag in "abcdef":
        client = await Client.to(proxy)
        client.writer.write(chat(tag, connection="close"))
        status, fields, body = await client.answer()
        assert (status, fields["connection"]) == (200, "close")
        assert check_stream(text_of(body), f"[[id:{tag}]] [[n:5]]") == 5
        assert await client.reader.read() == b"", "the proxy closes, as it was asked to"
        accepted = accepted or node.server.accepted
    assert node.server.accepted == accepted, "the first request's connection carried the others"
    received = node.requests("/api/generate")
    assert not any(each.header("connection") for each in received), "that was between client and proxy"


async def test_a_body_in_chunks_arrives_whole(proxy: RunningProxy, node: FakeOllama) -> None:
    client = await Client.to(proxy)
    head, _, body = chat("a").partition(b"\r\n\r\n")
    head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    pieces = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body)
    client.writer.write(head + b"\r\n\r\n" + pieces + b"0\r\nTrailer-Field: 1\r\n\r\n" + VERSION)
    assert check_stream(text_of((await client.answer())[2]), "[[id:a]] [[n:5]]") == 5
    assert (await client.answer())[0] == 200
    [received] = node.requests("/api/generate")
    assert received.body == body
    assert received.header("trailer-field") is None


async def test_a_client_that_waits_for_leave_gets_it(proxy: RunningProxy) -> None:
    client = await Client.to(proxy)
    head, _, body = chat("a", Expect="100-continue").partition(b"\r\n\r\n")
    client.writer.write(head + b"\r\n\r\n")
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.writer.write(body)
    assert check_stream(text_of((await client.answer())[2]), "[[id:a]] [[n:5]]") == 5


async def test_who_is_refused_while_it_waits_for_leave_sends_no_body(proxy: RunningProxy) -> None:
    client = await Client.to(proxy)
    client.writer.write(request_bytes("/api/chat", Content_Length=str(1 << 40), Expect="100-continue"))
    status, fields, _ = await client.answer()
    assert (status, fields["connection"]) == (413, "close")
    assert await client.reader.read() == b""


async def test_head_has_no_body(proxy: RunningProxy) -> None:
    client = await Client.to(proxy)
    client.writer.write(request_bytes("/api/tags", method="HEAD") + VERSION)
    status, fields, _ = await client.answer(bare=True)
    assert status == 200
    assert int(fields["content-length"]) > 0
    assert orjson.loads((await client.answer())[2])["version"]


@pytest.mark.parametrize(
    "request_line",
    [b"GET /api/version HTTP/1.0", b"GET http://localhost/api/version HTTP/1.1"],
)
async def test_what_is_not_plain_goes_the_ordinary_way(proxy: RunningProxy, request_line: bytes) -> None:
    client = await Client.to(proxy)
    client.writer.write(VERSION)
    assert (await client.answer())[0] == 200
    client.writer.write(request_line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    status, _, body = await client.answer()
    assert status == 200
    assert orjson.loads(body)["version"]


@pytest.mark.parametrize(
    "line", [b"POST /api/generate HTTP/1.0", b"POST http://localhost/api/generate HTTP/1.1"]
)
async def test_what_is_not_plain_and_large_arrives_whole(
    proxy: RunningProxy, node: FakeOllama, line: bytes
) -> None:
    """The first piece is large, after which the lane would rest, and is handed to the layers at once."""
    client = await Client.to(proxy)
    prompt = "[[id:a]] [[n:5]]" + " word" * (256 << 10)
    sent = request_bytes("/api/generate", {"model": "llama3.2", "prompt": prompt, "stream": False})
    client.writer.write(line + sent[sent.index(b"\r\n") :])
    status, _, body = await client.answer()
    assert status == 200
    assert check_stream(text_of(body), "[[id:a]] [[n:5]]") == 5
    [received] = node.requests("/api/generate")
    assert orjson.loads(received.body)["prompt"] == prompt


async def test_a_request_in_pieces_is_one(proxy: RunningProxy) -> None:
    client = await Client.to(proxy)
    for byte in chat("a"):
        client.writer.write(bytes([byte]))
        await client.writer.drain()
    assert check_stream(text_of((await client.answer())[2]), "[[id:a]] [[n:5]]") == 5


async def test_what_must_not_be_sent_twice_gets_a_connection_of_its_own(
    proxy: RunningProxy, node: FakeOllama
) -> None:
    """A node may close a kept connection at the very moment at which the proxy uses it."""
    client = await Client.to(proxy)
    client.writer.write(chat("a"))
    await client.answer()
    before = node.server.accepted
    client.writer.write(request_bytes("/api/create", {"model": "new", "from": "llama3.2"}))
    assert (await client.answer())[0] == 200
    assert node.server.accepted > before
