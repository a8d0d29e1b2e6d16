"""Nothing is buffered: a token goes out as it comes, and who is slow slows the other side down."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson
import pytest

from tests.fakes.faults import hang
from tests.fakes.fixtures import NodeFactory
from tests.fakes.tokens import check_stream
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

ENDLESS = "[[id:flood]] [[n:1000000]]"
STALL_LIMIT_BYTES = 64 << 20  #: far above the kernel's socket buffers, far below what would be sent


async def test_a_token_reaches_the_client_before_the_next_is_made(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(hang("after_chunks", chunks=3, path="/api/generate"))
    async with RunningProxy([node]) as proxy, aiohttp.ClientSession() as session:
        body = {"model": "llama3.2", "prompt": "[[id:x]] [[n:9]]"}
        async with session.post(f"{proxy.url}/api/generate", json=body) as answer, asyncio.timeout(20):
            lines = [orjson.loads(await answer.content.readline()) for _ in range(3)]
            assert not node.requests("/api/generate")[0].finished_s, "the node is still at it"
    assert [line["response"] for line in lines] == [" x-0", " x-1", " x-2"]


async def test_a_client_that_does_not_read_stalls_its_node(ollama_node: NodeFactory) -> None:
    node = await ollama_node(time_scale=1e-4)
    async with RunningProxy([node]) as proxy, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
        body = orjson.dumps({"model": "llama3.2", "prompt": ENDLESS})
        writer.write(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        [record] = await node.wait_received(1, path="/api/generate")
        sent = -1
        while record.sent_bytes != sent or not sent:  # until it has stopped growing
            sent = record.sent_bytes
            await asyncio.sleep(0.5)
        assert record.finished_s is None
        assert sent < STALL_LIMIT_BYTES
        await reader.readuntil(b"\r\n\r\n")
        text = ""
        for _ in range(2000):  # reading again, all is there and in order
            size = int(await reader.readuntil(b"\r\n"), 16)
            for line in (await reader.readexactly(size + 2)).split(b"\n"):
                text += orjson.loads(line)["response"] if line.startswith(b"{") else ""
        assert check_stream(text, ENDLESS, complete=False) >= 2000
        writer.close()
        await node.wait_finished(record)


async def test_a_node_that_does_not_read_stalls_an_upload(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(hang("mid_body", bytes=1 << 20, path="/api/blobs/*", method="POST"))
    piece, sent = bytes(1 << 20), 0
    async with RunningProxy([node]) as proxy, asyncio.timeout(60):
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"POST /api/blobs/sha256:%s HTTP/1.1\r\nHost: localhost\r\n" % (b"0" * 64))
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 4 * STALL_LIMIT_BYTES:
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                async with asyncio.timeout(3):
                    await writer.drain()
                sent += len(piece)
        except TimeoutError:
            pass
        writer.close()
    assert 0 < sent < STALL_LIMIT_BYTES
