"""The demo's stage: child processes with their logs, what to print, and what must hold."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

READY_LIMIT_S = 180.0  #: a slow disk assembles and loads the model; far above what a laptop needs
_SOLLOL = (sys.executable, "-c", "from proxy_addon.cli import main; main()")


class DemoFailed(Exception):
    """Something that the demo was to show did not hold."""


@dataclass
class Service:
    """A child process with its log."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass(frozen=True)
class Said:
    """What came of a streamed chat."""

    pieces: int
    done: bool
    headers: dict[str, str]


@dataclass
class Stage:
    """What runs, and where to print."""

    console: Console
    state: Path
    session: aiohttp.ClientSession
    port: int = 0
    regular_port: int = 0
    shard_port: int = 0  #: of the coordinator, which starts in the last act
    node_ports: list[int] = field(default_factory=list)
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The proxy."""
        return f"http://127.0.0.1:{self.port}"

    def act(self, title: str) -> None:
        """Begin a part."""
        self.console.rule(f"[bold]{title}", align="left")

    def holds(self, fact: bool, sentence: str) -> None:
        """Print what was shown; raise DemoFailed if it did not hold."""
        if not fact:
            raise DemoFailed(sentence)
        self.console.print(f"[green]✓[/] {sentence}")

    async def start(self, name: str, *arguments: str) -> None:
        """Start ``sollol ARGUMENTS``; its output goes to a log."""
        log = self.state / f"{name}.log"
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *_SOLLOL,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                # TMPDIR: a killed node cannot remove its own temporary directory.
                env={
                    **clean_environment(),
                    "XDG_STATE_HOME": str(self.state / name),
                    "TMPDIR": str(self.state),
                },
            )
        self.services[name] = Service(name, process, log)

    async def sollol(self, *arguments: str) -> tuple[int, str]:
        """Run ``sollol ARGUMENTS`` to its end; its status and output."""
        process = await asyncio.create_subprocess_exec(
            *_SOLLOL,
            *arguments,
            env={**clean_environment(), "COLUMNS": str(self.console.width)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        return process.returncode or 0, out.decode(errors="replace").rstrip()

    async def chat(self, model: str, prompt: str) -> Said:
        """Stream a chat of the proxy through the ollama client, and print it as it comes."""

        async def note(response: Any) -> None:
            headers.update(response.headers)

        headers: dict[str, str] = {}
        client = import_module("ollama").AsyncClient(host=self.url, event_hooks={"response": [note]})
        self.console.print(f"[bold]{prompt}[/]", end="")
        pieces, done = 0, False
        async for part in await client.chat(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            stream=True,
            options={"temperature": 0, "num_predict": 24},
        ):
            self.console.print(part.message.content, end="", markup=False)
            pieces += bool(part.message.content)
            done = bool(part.done)
        self.console.print()
        return Said(pieces, done, headers)

    async def stop(self) -> None:
        """End every child: politely, then by force."""
        running = [s.process for s in self.services.values() if s.process.returncode is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def until(self, what: str, ready: Callable[[], Awaitable[bool]]) -> None:
        """Wait for ``ready``, noticing a child that has died; raise DemoFailed with the reason."""
        deadline_s = time.monotonic() + READY_LIMIT_S
        while not await ready():
            for service in self.services.values():
                if service.process.returncode is not None:
                    raise DemoFailed(f"{service.name} ended by itself:\n{service.tail()}")
            if time.monotonic() > deadline_s:
                raise DemoFailed(f"{what} took longer than {READY_LIMIT_S:.0f} s")
            await asyncio.sleep(0.1)

    async def get(self, url: str) -> Any:
        """The JSON behind ``url``; None while nobody answers."""
        try:
            async with self.session.get(url) as answer:
                return await answer.json(content_type=None) if answer.status == 200 else None
        except aiohttp.ClientError:
            return None


def clean_environment() -> dict[str, str]:
    """The environment without what would lead clients or the proxy elsewhere."""
    elsewhere = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ollama_host")
    return {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in elsewhere and not name.startswith("SOLLOL_")
    }


def free_ports(count: int) -> list[int]:
    """Ports that were free just now; all are held until the last is known, so that none is given twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(sock.getsockname()[1]) for sock in sockets]
