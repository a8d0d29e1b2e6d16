"""Lines on disk in a bounded ring of two files, written in batches by a thread of their own."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

FLUSH_AFTER_S = 0.5  #: lines reach the disk in batches, so long after the first of a batch
UNWRITTEN_BYTES = 16 << 20  #: a disk that hangs costs the oldest lines, never memory without end


class RingFile:
    """Appends lines to ``path``, which replaces ``previous_path`` once it has ``file_bytes`` or more.

    Every file begins with ``header``; so does what another process appends to it, of which several may, in
    turns. Lines without their end (a crash, a full disk) are ended first, so that they spoil no other line.
    """

    def __init__(self, path: Path, previous_path: Path, header: bytes, file_bytes: int) -> None:
        self.path = path
        self.previous_path = previous_path
        self.lost = 0  #: lines that could not be written
        self._header = header
        self._end: tuple[int, int] | None = None
        #: the file and its length when we had written last (the thread's own): what is appended there stands
        #: below our header
        self._file_bytes = file_bytes
        self._unwritten: deque[bytes] = deque()
        self._unwritten_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._writing: Future[int] | None = None
        self._writer = ThreadPoolExecutor(1, path.stem)

    def append(self, line: bytes) -> None:
        """Write ``line``, with its end, soon. Needs a running loop, and never waits for the disk."""
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

    async def keep(self) -> None:
        """Write what is unwritten."""
        await self.written()
        self.flush()
        await self.written()

    async def close(self) -> None:
        """Write what is unwritten, and no more."""
        await self.keep()
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
            with _alone_in(self.path.parent):
                if self.path.exists() and self.path.stat().st_size >= self._file_bytes:
                    self.path.replace(self.previous_path)
                with self.path.open("ab") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    if (inode, file.tell()) != self._end:
                        file.write((b"\n" if file.tell() else b"") + self._header + b"\n")
                    file.write(b"".join(batch))  # at once: each write hands the interpreter's lock to and fro
                    file.flush()
                    self._end = inode, file.tell()
        except OSError as exc:
            self._end = None  # it may end in the middle of a line now
            log.warning("%s cannot be written: %s", self.path, exc)
            return len(batch)
        return 0


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that write here from doing so meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
