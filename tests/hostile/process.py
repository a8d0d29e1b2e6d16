"""`sollol proxy` as a process of its own, for attacks that take many sockets or much of a processor."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

SOLLOL = (sys.executable, "-c", "from proxy_addon.cli import main; main()")
READY = b"SOLLOL listens on 127.0.0.1:"
BOUND_S = 60.0  #: only a hang takes longer


@dataclass
class Proxy:
    """A running proxy."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def proxy_process(folder: Path, nodes: Iterable[Any], **settings: Any) -> AsyncIterator[Proxy]:
    """A proxy over ``nodes``, whose state and configuration are in ``folder``; ended politely."""
    config = folder / "sollol.yaml"
    off = {"mdns": False, "ollama_host": False, "localhost": False, "agents": False}
    config.write_bytes(
        orjson.dumps({"listen": "127.0.0.1:0", "nodes": list(nodes), "discovery": off, **settings})
    )
    process = await asyncio.create_subprocess_exec(
        *SOLLOL, "proxy", "--config", str(config), "--state-dir", str(folder / "state"),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert process.stderr is not None
    said: list[bytes] = []
    try:
        async with asyncio.timeout(BOUND_S):
            while READY not in (line := await process.stderr.readline()):
                said.append(line)
                assert line, b"".join(said).decode()
        drained = asyncio.create_task(process.stderr.read())
        yield Proxy(int(line.partition(READY)[2].partition(b":")[0]), process.pid)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()
    await drained
