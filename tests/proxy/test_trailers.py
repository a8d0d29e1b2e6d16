"""Trailers that nobody announced must neither hang a client nor reach a node."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

BODY = orjson.dumps({"model": "llama3.2", "prompt": "[[id:t]] [[n:3]]", "stream": False})


async def test_trailers_of_a_request_are_dropped(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    async with RunningProxy([node]) as proxy, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for _ in range(2):  # the connection goes on afterwards
            writer.write(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            writer.write(b"%x\r\n%s\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(BODY), BODY))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            assert orjson.loads(await reader.readexactly(length))["response"] == " t-0 t-1 t-2"
        writer.close()
    received = node.requests("/api/generate")
    assert [record.body for record in received] == [BODY, BODY]
    assert all(record.header("x-sum") is None for record in received)
