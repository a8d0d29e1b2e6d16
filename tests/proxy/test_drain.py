"""The end of a real proxy process: what has come is served, connections end one by one; twice is at once."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
import pytest

from proxy_addon.fleet.discovery import Discovery
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy

PROMPT = "[[id:drain]] [[n:40]]"
#: By our own data plane, and by mitmproxy's layers.
WAYS = pytest.mark.parametrize("way", ["splice=true", "splice=false"])


@asynccontextmanager
async def proxy_process(
    node: FakeOllama, state: Path, *sets: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from proxy_addon.cli import main; main()",
        "proxy", "--listen", "127.0.0.1:0", "--nodes", node.host_port, "--state-dir", str(state),
        "--set", "discovery.mdns=false", "--set", "discovery.ollama_host=false",
        *(part for each in sets for part in ("--set", each)),
        stderr=asyncio.subprocess.PIPE,
        # A shell's background jobs ignore SIGINT, and the proxy would go on to.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr
    try:
        async with asyncio.timeout(60):
            while b"SOLLOL listens on " not in (line := await process.stderr.readline()):
                assert line, "the proxy ended"
        port = int(line.split(b"listens on ")[1].split(b":")[1])
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def closed(url: str) -> None:
    """Return once nothing listens at ``url`` any more."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            except ConnectionRefusedError:
                return
            except ConnectionResetError:  # it came at the very moment of the closing
                continue
            writer.close()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_answer_in_progress_is_let_finish(
    ollama_node: NodeFactory, tmp_path: Path, number: signal.Signals
) -> None:
    node = await ollama_node()
    async with proxy_process(node, tmp_path) as (process, url), aiohttp.ClientSession() as session:
        node.hold_tokens()
        streaming = asyncio.create_task(ask(session, url, BY_NAME["generate"], PROMPT))
        await node.wait_received(1, path="/api/generate")
        process.send_signal(number)
        await closed(url)
        node.go_on()
        heard = await streaming
        assert heard.ended and not heard.error
        check_stream(heard.text, PROMPT)
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def reach(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))


async def version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, more: str = "") -> bytes:
    """The head of the answer to one request; its body is read."""
    writer.write(f"GET /api/version HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(row for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return head


@WAYS
async def test_a_kept_connection_is_served_once_more_and_told_to_close(
    ollama_node: NodeFactory, tmp_path: Path, way: str
) -> None:
    node = await ollama_node()
    async with proxy_process(node, tmp_path, way) as (process, url), aiohttp.ClientSession() as session:
        kept = await reach(url)
        assert b"close" not in (await version(*kept)).lower()
        node.hold_tokens()
        streaming = asyncio.create_task(ask(session, url, BY_NAME["generate"], PROMPT))
        await node.wait_received(1, path="/api/generate")
        process.send_signal(signal.SIGTERM)
        await closed(url)
        head = (await version(*kept)).lower()
        assert head.startswith(b"http/1.1 200 ") and b"connection: close" in head
        assert await kept[0].read() == b""
        node.go_on()
        assert (await streaming).ended
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        kept[1].close()


@WAYS
async def test_an_idle_connection_is_closed_and_holds_nothing_up(
    ollama_node: NodeFactory, tmp_path: Path, way: str
) -> None:
    node = await ollama_node()
    async with proxy_process(node, tmp_path, way) as (process, url):
        fresh, kept = await reach(url), await reach(url)
        await version(*kept)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await fresh[0].read() == await kept[0].read() == b""
            assert await process.wait() == 0
        fresh[1].close()
        kept[1].close()


@WAYS
async def test_who_waits_in_line_is_served(ollama_node: NodeFactory, tmp_path: Path, way: str) -> None:
    node = await ollama_node()
    async with proxy_process(node, tmp_path, way) as (process, url), aiohttp.ClientSession() as session:
        node.hold_tokens()
        asked = [asyncio.create_task(ask(session, url, BY_NAME["chat"], PROMPT)) for _ in range(3)]
        await node.wait_received(1, path="/api/chat")
        await waiting(session, url, 2)
        process.send_signal(signal.SIGTERM)
        await closed(url)
        node.go_on()
        for heard in await asyncio.gather(*asked):
            assert heard.ended and not heard.error
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def waiting(session: aiohttp.ClientSession, url: str, count: int) -> None:
    """Return once so many wait in the proxy's line."""
    async with asyncio.timeout(20):
        while True:
            async with session.get(f"{url}/sollol/queue") as response:
                if len((await response.json())["queue"]) == count:
                    return


async def test_who_still_waits_at_the_limit_is_told_in_its_protocol(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    async with (
        proxy_process(node, tmp_path, "timeouts.drain_s=0.5") as (process, url),
        aiohttp.ClientSession() as session,
    ):
        node.hold_tokens()
        first = asyncio.create_task(ask(session, url, BY_NAME["chat"], PROMPT))
        await node.wait_received(1, path="/api/chat")
        second = asyncio.create_task(ask(session, url, BY_NAME["openai"], PROMPT))
        await waiting(session, url, 1)
        process.send_signal(signal.SIGTERM)
        for heard in await asyncio.gather(first, second):
            assert heard.status == 503 and heard.error and "SOLLOL is shutting down" in heard.error
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_the_process_carries_no_assertions(ollama_node: NodeFactory, tmp_path: Path) -> None:
    async with proxy_process(await ollama_node(), tmp_path) as (process, _):
        assert psutil.Process(process.pid).cmdline()[1] == "-OO"


async def test_a_second_signal_ends_it_at_once(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy_process(node, tmp_path) as (process, url), aiohttp.ClientSession() as session:
        node.hold_tokens()
        streaming = asyncio.create_task(ask(session, url, BY_NAME["chat-whole"], PROMPT))
        await node.wait_received(1, path="/api/chat")
        process.send_signal(signal.SIGTERM)
        await closed(url)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        with pytest.raises(aiohttp.ClientError):
            await streaming


async def test_who_is_cut_off_at_the_limit_is_told_in_its_protocol(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    endless = "[[id:drain]] [[n:1000000]]"
    async with (
        proxy_process(node, tmp_path, "timeouts.drain_s=0.5") as (process, url),
        aiohttp.ClientSession() as session,
    ):
        streaming = asyncio.create_task(ask(session, url, BY_NAME["generate"], endless))
        await node.wait_until(lambda: any(r.chunks > 2 for r in node.requests("/api/generate")))
        process.send_signal(signal.SIGTERM)
        heard = await streaming
        assert heard.error and "SOLLOL is shutting down" in heard.error
        assert not heard.broken and not heard.ended
        check_stream(heard.text, endless, complete=False)
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_a_library_that_logs_an_error_at_the_start_does_not_stop_the_proxy(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Discovery.start

    async def noisy(self: Discovery) -> None:
        logging.getLogger("somebody.else").error("this and that")
        await start(self)

    monkeypatch.setattr(Discovery, "start", noisy)
    async with RunningProxy([await ollama_node()]) as proxy, aiohttp.ClientSession() as session:
        assert (await ask(session, proxy.url, BY_NAME["chat"], PROMPT)).ended
