"""A new process takes over from the old one, under load: nobody is refused, reset or forgotten."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.processes import kill, launch, proxy, sets

PROMPT = "[[id:upgrade]] [[n:20]]"
PACE_S = 0.02  #: between two requests of a client: the load must leave this machine time to start processes


class Load:
    """Clients that ask again and again, on kept connections and on fresh ones."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.done = 0
        self.going = True
        self.clients: list[asyncio.Task[None]] = []

    async def client(self, session: aiohttp.ClientSession) -> None:
        while self.going:
            heard = await ask(session, self.url, BY_NAME["chat"], PROMPT)
            assert heard.status == 200 and heard.ended and not heard.error
            check_stream(heard.text, PROMPT)
            await self._done()

    async def newcomer(self) -> None:
        while self.going:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
            writer.write(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await self._done()

    async def _done(self) -> None:
        self.done += 1
        await asyncio.sleep(PACE_S)

    async def more(self, count: int) -> None:
        """Return once so many more requests have been answered."""
        until = self.done + count
        async with asyncio.timeout(60):
            while self.done < until:
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Let each end with the request that it is at."""
        self.going = False
        await asyncio.wait(self.clients)


@asynccontextmanager
async def under_load(url: str) -> AsyncIterator[Load]:
    load = Load(url)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as clients:
        for _ in range(3):
            load.clients += [clients.create_task(load.client(session)), clients.create_task(load.newcomer())]
        await load.more(20)
        yield load
        await load.stop()


def arguments(node: FakeOllama, *settings: str) -> list[str]:
    return ["--nodes", node.host_port, *sets(*settings)]


async def test_nothing_is_lost_when_a_new_process_takes_over(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    async with (
        proxy(tmp_path, *arguments(node)) as old,
        under_load(old.url) as load,
        proxy(tmp_path, *arguments(node)) as new,
    ):
        assert new.url == old.url
        assert await old.ended() == 0
        await load.more(20)
        await load.stop()
    await old.said(f"Process {new.process.pid} has taken the port over.")


async def test_a_stream_goes_on_in_the_old_process(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node)) as old, aiohttp.ClientSession() as session:
        node.hold_tokens()
        streaming = asyncio.create_task(ask(session, old.url, BY_NAME["generate"], PROMPT))
        await node.wait_received(1, path="/api/generate")
        async with proxy(tmp_path, *arguments(node)) as new:
            await old.said("has taken the port over")
            old.process.send_signal(signal.SIGTERM)  # by habit: it is draining already
            async with session.get(f"{new.url}/api/version") as response:
                assert response.status == 200
            node.go_on()
            heard = await streaming
            assert heard.ended and not heard.error
            assert await old.ended() == 0


async def test_a_new_process_that_fails_leaves_the_old_one_alone(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node, never = await ollama_node(), socket.socket()
    with never:
        never.bind(("127.0.0.1", 0))
        never.listen(0)
        silent = f"127.0.0.1:{never.getsockname()[1]}"
        async with proxy(tmp_path, *arguments(node)) as old, under_load(old.url) as load:
            new = await launch(tmp_path, "--nodes", silent, *sets("poll.timeout_s=60"))
            try:
                # It has the port by now, and waits for its node.
                async with asyncio.timeout(30):
                    await asyncio.get_running_loop().run_in_executor(None, never.accept)
            finally:
                await kill(new)
            await old.said("has ended before it could")
            await load.more(20)


async def test_what_was_learned_is_handed_on(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node)) as old, aiohttp.ClientSession() as session:
        heard = await ask(session, old.url, BY_NAME["chat"], PROMPT)
        async with proxy(tmp_path, *arguments(node)) as new:
            assert await old.ended() == 0
            request_id = heard.headers["x-sollol-request-id"]
            async with session.get(f"{new.url}/sollol/explain/{request_id}") as response:
                assert response.status == 200
            assert node.host_port in (tmp_path / "speeds.json").read_text()


async def test_a_foreign_process_on_the_port_is_named(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path / "one", *arguments(node)) as there:
        other = await launch(
            tmp_path / "two", "--listen", there.url.removeprefix("http://"), *arguments(node)
        )
        assert await other.ended() == 1
        await other.said("another SOLLOL holds the port")


async def test_sigusr2_starts_the_successor(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node)) as old:
        old.process.send_signal(signal.SIGUSR2)
        line = await old.said("A successor has been started: process ")
        successor = int(line.rpartition(" ")[2].rstrip("."))
        try:
            await old.said("SOLLOL listens on ", 2)  # it writes to the same log
            await old.said(f"Process {successor} has taken the port over.")
        finally:
            os.kill(successor, signal.SIGKILL)
        assert await old.ended() == 0


async def test_systemd_is_told_who_serves_now(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        environ = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        old = await launch(tmp_path, *arguments(node), environ=environ)
        try:
            await old.started()
            async with proxy(tmp_path, *arguments(node)) as new:
                assert await old.ended() == 0
                told = await everything(manager)
                assert f"MAINPID={new.process.pid}" in told and "STOPPING=1" not in told
        finally:
            await kill(old)


async def everything(manager: socket.socket) -> list[str]:
    """What has been sent by now."""
    told: list[str] = []
    while True:
        try:
            told += manager.recv(4096).decode().split("\n")
        except BlockingIOError:
            return told
