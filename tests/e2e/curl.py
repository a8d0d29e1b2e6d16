"""curl as a user runs it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

#: No ~/.curlrc, errors said, nothing else.
QUIET = ("curl", "--disable", "--silent", "--show-error")


@dataclass(frozen=True)
class Curled:
    """What curl got. ``statuses`` are those of every head, ``100 Continue`` included."""

    code: int
    statuses: list[int]
    headers: dict[str, str]
    body: bytes
    said: str

    @property
    def status(self) -> int:
        return self.statuses[-1]

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str:
        """Ollama's sentence."""
        return str(self.json["error"])


async def curl(*arguments: str | Path) -> Curled:
    """Run curl to its end. Its output is the body."""
    with tempfile.TemporaryDirectory(prefix="sollol-curl-") as folder:
        head = Path(folder) / "head"
        head.touch()
        process = await asyncio.create_subprocess_exec(
            *QUIET, "--dump-header", str(head), *map(str, arguments),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        heads = [block.splitlines() for block in head.read_bytes().decode().split("\r\n\r\n") if block]
    statuses = [int(lines[0].split()[1]) for lines in heads]
    fields = [line.split(": ", 1) for line in (heads[-1][1:] if heads else []) if ": " in line]
    headers = {name.lower(): value for name, value in fields}
    assert process.returncode is not None
    return Curled(process.returncode, statuses, headers, out, err.decode())


@asynccontextmanager
async def curling(*arguments: str | Path) -> AsyncIterator[asyncio.StreamReader]:
    """curl at work: its output as it comes. curl is killed at the end, if it is still there."""
    process = await asyncio.create_subprocess_exec(
        *QUIET, "--no-buffer", *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
