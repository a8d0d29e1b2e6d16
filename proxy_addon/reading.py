"""Who reads a body: the loop itself what is short, a process beside it what is long or dense.

The proxy serves everybody on one loop, and a body is parsed in one go: what takes a millisecond there keeps
all others waiting for one. So the longer ones go to :mod:`reader`, the moderate and the huge to a process
each, that the first wait for none of the second. The processes are started when they are first needed.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress

from proxy_addon import prefix
from proxy_addon.ask import Ask, BadRequest
from proxy_addon.endpoints import Endpoint
from proxy_addon.reader import LENGTH, Reply, frame

#: Read on the loop, whatever it is: the worst takes 3 ms.
SHORT_BYTES = 8 << 10
#: Read on the loop if it has fewer than :data:`DENSE` values: text, an image. About 2 ms.
MODERATE_BYTES = 256 << 10
DENSE = 2048
HUGE_BYTES = 1 << 20  #: from here on bodies wait for each other only
LIMIT_S = 10.0  #: 100 MB of text and images take under one
PIECE_BYTES = 256 << 10
_HEADERS = ("content-type", "content-encoding")  #: that :func:`ask.parse` reads

#: In a process group of its own: a Ctrl-C is for the proxy, which ends this one. A session of its own would
#: do that, too, but Linux shares processors out among sessions (autogroup, sched(7)): niceness counts within.
_PROGRAM = "import os; os.setpgid(0, 0); from proxy_addon.reader import main; main()"


def is_short(headers: Mapping[str, str], content: bytes) -> bool:
    """Whether a body is read within a few milliseconds, so that the loop may do it."""
    if "content-encoding" in headers:
        return False  # 30 kB of zstd can be 20 MB
    size = len(content)
    if size <= SHORT_BYTES:
        return True
    if size > MODERATE_BYTES or headers.get("content-type", "").startswith("multipart/"):
        return False
    return sum(map(content.count, (b",", b"[", b"{"))) < DENSE


class Reading:
    """The two readers."""

    def __init__(self) -> None:
        self._moderate, self._huge = _Reader(), _Reader()

    async def read(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], content: bytes, client: str
    ) -> Ask:
        """As :func:`ask.parse`, and raises as that does; for what is not :func:`short <is_short>`."""
        reader = self._huge if len(content) > HUGE_BYTES else self._moderate
        order = (path, {name: headers[name] for name in _HEADERS if name in headers}, client, len(content))
        reply = await reader.read(frame(order), content)
        if isinstance(reply, tuple):
            raise BadRequest(*reply)
        reply.endpoint = endpoint
        return reply

    async def close(self) -> None:
        """End the processes."""
        await asyncio.gather(self._moderate.close(), self._huge.close())


class _Reader:
    """One process, which reads one body after the other."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def read(self, order: bytes, content: bytes) -> Reply:
        async with self._turn:
            try:
                async with asyncio.timeout(LIMIT_S):
                    return await self._asked(order, content)
            except TimeoutError:
                await self.close()
                return 413, f"the request body takes more than {LIMIT_S:g} s to read"
            except (ConnectionError, asyncio.IncompleteReadError):
                await self.close()
                return 400, "the request body cannot be read: its reader did not survive it"
            except asyncio.CancelledError:
                await self.close()  # nobody would take the reply
                raise

    async def _asked(self, order: bytes, content: bytes) -> Reply:
        if self._process is None or self._process.returncode is not None:
            self._process = await _started()
        sink, source = self._process.stdin, self._process.stdout
        assert sink is not None and source is not None
        sink.write(order)
        rest = memoryview(content)
        while rest:
            sink.write(rest[:PIECE_BYTES])
            rest = rest[PIECE_BYTES:]
            await sink.drain()
        (length,) = LENGTH.unpack(await source.readexactly(LENGTH.size))
        reply: Reply = pickle.loads(await source.readexactly(length))
        return reply

    async def close(self) -> None:
        """End the process, in whatever it is."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _started() -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    process.stdin.write(frame(prefix.key()))
    return process
