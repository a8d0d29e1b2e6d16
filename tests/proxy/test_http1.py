"""What mitmproxy refuses by itself is told in JSON, in one sentence, and the connection is closed."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

REFUSED = {
    "two lengths": (
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    ),
    "a length that is none": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{}",
    "length and chunks": (
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "no HTTP": b"hello\r\n\r\n",
}


@pytest.mark.parametrize("what", REFUSED)
async def test_a_broken_head_gets_one_clear_sentence(ollama_node: NodeFactory, what: str) -> None:
    node = await ollama_node()
    async with RunningProxy([node]) as proxy, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(REFUSED[what])
        answer = await reader.read()  # to its end: the connection is closed
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"mitmproxy" not in answer and b"validate_inbound" not in answer
    assert orjson.loads(body)["error"]
    assert not node.requests("/api/chat")
