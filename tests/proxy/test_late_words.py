"""What a node said before it was given up must not be heard as the next attempt's words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy

PROMPT = "[[id:late]] [[n:6]]"
ERROR = b'{"error":"llama runner process no longer running: -1"}\n'
#: Head, error and the end of the body in one packet, and a second answer that nobody asked for.
AT_ONCE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%s\r\n1\r\n\n\r\n0\r\n\r\n" % (len(ERROR), ERROR)
)


@asynccontextmanager
async def front(node: FakeOllama, answer: bytes) -> AsyncIterator[str]:
    """A node that answers a chat with ``answer``, in one packet, and everything else as ``node`` does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"/api/chat" in head:
                    writer.write(answer)
                    continue
                there, back = await asyncio.open_connection(*node.host_port.split(":"))
                back.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                writer.write(await there.read())
                back.close()
                break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()  # not waited for: the proxy keeps its connections


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
async def test_an_error_that_comes_whole_in_one_packet_is_tried_elsewhere(
    ollama_node: NodeFactory, splice: bool
) -> None:
    node = await ollama_node()
    async with (
        front(node, AT_ONCE) as bad,
        RunningProxy([bad, node], placement="round_robin", splice=splice) as proxy,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(4):
            heard = await ask(session, proxy.url, BY_NAME["chat"], PROMPT)
            assert (heard.status, heard.error, heard.ended) == (200, None, True)
            check_stream(heard.text, PROMPT)
        text = proxy.sollol.telemetry.expose("")[0].decode()
    assert "sollol_retries_total{" in text  # it was tried there
    assert "sollol_hook_errors_total{" not in text


OWN = b'{"error":"an error was encountered while running the model: unexpected grammar"}\n'


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
async def test_an_error_that_every_node_would_give_is_the_nodes_own(
    ollama_node: NodeFactory, splice: bool
) -> None:
    node = await ollama_node()
    async with (
        front(node, AT_ONCE.replace(b"%x\r\n%s" % (len(ERROR), ERROR), b"%x\r\n%s" % (len(OWN), OWN))) as bad,
        RunningProxy([bad], splice=splice) as proxy,
        aiohttp.ClientSession() as session,
    ):
        heard = await ask(session, proxy.url, BY_NAME["chat"], PROMPT)
    assert (heard.status, heard.error) == (
        500,
        "an error was encountered while running the model: unexpected grammar",
    )
