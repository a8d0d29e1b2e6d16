"""Real proxy processes over given nodes: what they say, and where they listen."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

LISTENS = re.compile(r"SOLLOL listens on \S*?:(\d+)")
START_S = 100.0  #: a start takes one second; this machine may have other things to do


class Proxy:
    """A process, and the lines of its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._more = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            async with self._more:
                self.lines.append(line.decode().rstrip())
                self._more.notify_all()
        async with self._more:
            self._more.notify_all()

    async def said(self, text: str, times: int = 1) -> str:
        """The line with ``text``, once it is there; the last one of so many."""
        async with asyncio.timeout(START_S), self._more:
            while len(found := [line for line in self.lines if text in line]) < times:
                assert not self._reader.done(), "the proxy ended:\n" + "\n".join(self.lines)
                await self._more.wait()
        return found[times - 1]

    async def started(self) -> None:
        """Return once it serves."""
        line = await self.said("SOLLOL listens on ")
        match = LISTENS.search(line)
        assert match
        self.url = f"http://127.0.0.1:{match[1]}"

    async def ended(self) -> int:
        """Its exit status, once it has ended."""
        async with asyncio.timeout(START_S):
            return await self.process.wait()


async def launch(state: Path, *arguments: str, environ: dict[str, str] | None = None) -> Proxy:
    """Start ``sollol proxy`` on some loopback port, without discovery."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from proxy_addon.cli import main; main()",
        "proxy", "--listen", "127.0.0.1:0", "--state-dir", str(state),
        "--set", "discovery.mdns=false", "--set", "discovery.ollama_host=false", *arguments,
        stderr=asyncio.subprocess.PIPE, env=environ,
    )  # fmt: skip
    return Proxy(process)


@asynccontextmanager
async def proxy(state: Path, *arguments: str) -> AsyncIterator[Proxy]:
    """One that serves; killed at the end, should it still run."""
    running = await launch(state, *arguments)
    try:
        await running.started()
        yield running
    finally:
        await kill(running)


async def kill(running: Proxy) -> None:
    """End it at once."""
    if running.process.returncode is None:
        running.process.kill()
    await running.process.wait()


def sets(*settings: str) -> Sequence[str]:
    """``--set`` for each."""
    return [part for each in settings for part in ("--set", each)]
