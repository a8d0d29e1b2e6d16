"""Lines on disk in a bounded ring of two files, written in batches by a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

FLUSH_AFTER_S = 0.5  #: lines reach the disk in batches, so long after the first of a batch
UNWRITTEN_BYTES = 16 << 20  #: a disk that hangs costs the oldest lines, never memory without end


class RingFile:
    """Appends lines to ``path``, which replaces ``previous_path`` once it has ``file_bytes`` or more.

    Every file begins with ``header``; so does what another process appends to it. Lines without their end
    (a crash, a full disk) are ended first, so that they spoil no other line.
    """

    def __init__(self, path: Path, previous_path: Path, header: bytes, file_bytes: int) -> None:
        self.path = path
        self.previous_path = previous_path
        self.lost = 0  #: lines that could not be written
        self._header = header
        self._headed = False  #: what is appended now stands below our header (the thread's own)
        self._file_bytes = file_bytes
        self._unwritten: deque[bytes] = deque()
        self._unwritten_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: Future[int] | None = None
        self._writer = ThreadPoolExecutor(1, path.stem)

    def append(self, line: bytes) -> None:
        """Write ``line`` soon. Needs a running loop, and never waits for the disk."""
        self._unwritten.append(line)
        self._unwritten_bytes += len(line)
        while self._unwritten_bytes > UNWRITTEN_BYTES:
            self._unwritten_bytes -= len(self._unwritten.popleft())
            self.lost += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Begin to write what is unwritten, unless a batch is under way: then once more a little later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None and not self._writing.done():  # the disk is slow: let it finish
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self.flush)
        elif self._unwritten:
            batch, self._unwritten, self._unwritten_bytes = self._unwritten, deque(), 0
            self._writing = self._writer.submit(self._write, batch)
            self._writing.add_done_callback(self._count_lost)

    async def close(self) -> None:
        """Write what is unwritten."""
        await self.written()
        self.flush()
        await self.written()
        self._writer.shutdown()

    async def written(self) -> None:
        """Wait until the batch under way is on disk, if there is one."""
        if self._writing is not None:
            await asyncio.wrap_future(self._writing)

    def _count_lost(self, written: Future[int]) -> None:
        self.lost += written.result()

    def _write(self, batch: deque[bytes]) -> int:
        """Append ``batch`` (in the writer's thread). Returns how many lines were lost."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size >= self._file_bytes:
                self.path.replace(self.previous_path)
                self._headed = False
            with self.path.open("ab") as file:
                if not self._headed:
                    file.write((b"\n" if file.tell() else b"") + self._header + b"\n")
                file.writelines(line + b"\n" for line in batch)
            self._headed = True
        except OSError as exc:
            self._headed = False  # it may end in the middle of a line now
            log.warning("%s cannot be written: %s", self.path, exc)
            return len(batch)
        return 0


def read_lines(path: Path, previous_path: Path) -> Iterator[bytes]:
    """What two such files hold, the oldest first, also while they are written to.

    Raises OSError where one is there and cannot be read. The last line may not be whole yet.
    """
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for each in (path, previous_path):  # in this order none is missed where one becomes the other now
            try:
                files.append(stack.enter_context(each.open("rb")))
            except FileNotFoundError:
                continue
        if len(files) == 2 and os.path.sameopenfile(files[0].fileno(), files[1].fileno()):
            files.pop()
        for file in reversed(files):
            yield from file
