"""The clients of the proxy benchmark, one process per measurement: small requests, or streams.

    python scripts/bench_proxy_client.py '{"do": "small", "port": 11434, …}'

Prints what it found as JSON. It follows HTTP only as far as it must to tell where an answer ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import uvloop

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
STAMP = re.compile(rb"@(\d+):(\d+)@")
LAST = b"0\r\n\r\n"
ANSWERED = b"HTTP/1.1 200"
LATE_US = 250_000  #: an app that shows tokens looks stuck
GRACE_S = 3.0  #: for what is still on its way at the end of a schedule
REST_S = 30.0  #: a request that takes longer than that is given up


@dataclass(frozen=True)
class Request:
    """A POST with a JSON body."""

    path: str
    body: str

    def bytes(self) -> bytes:
        """As it is sent."""
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n{self.body}".encode()


@dataclass(frozen=True)
class SmallTask:
    """``concurrency`` connections that each ask again as soon as they are answered."""

    port: int
    request: Request
    concurrency: int
    seconds: float
    warm_s: float = 0.2
    do: str = "small"


@dataclass(frozen=True)
class SmallFound:
    """Times of the requests that ended after the warm-up; ``answered`` counts all."""

    p50_ms: float
    p99_ms: float
    per_s: float
    answered: int
    wrong: dict[str, int]


@dataclass(frozen=True)
class StreamTask:
    """``count`` streams, begun evenly over ``ramp_s``, of ``chunks`` chunks at ``per_s`` each."""

    port: int
    request: Request
    count: int
    chunks: int
    per_s: float
    ramp_s: float = 0.0
    limit_s: float = REST_S
    do: str = "streams"


@dataclass(frozen=True)
class StreamFound:
    """What came, and how late. Chunks that did not come within the limit count as late."""

    asked: int
    came: int
    late: int
    late_max_ms: float
    way_max_ms: float  #: from being sent to being read
    node_max_ms: float  #: from being due to being sent
    open_most: int
    wrong: dict[str, int]


def quantile(ordered: Sequence[float], share: float) -> float:
    """By nearest rank; not a number where there is nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def answer_end(data: bytes) -> int | None:
    """Where the one answer in ``data`` ends; None while it has not come whole."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    if length := LENGTH.search(data, 0, head + 2):
        end = head + 4 + int(length[1])
        return end if len(data) >= end else None
    return len(data) if data.endswith(LAST) else None


def status(data: bytes) -> str:
    """What an answer's first line says."""
    return data[:80].partition(b"\r")[0].decode("latin-1")


class Small:
    """All connections of a run and what they found."""

    def __init__(self, task: SmallTask) -> None:
        self.task, self.bytes = task, task.request.bytes()
        self.took_s: list[float] = []
        self.answered = 0
        self.wrong: Counter[str] = Counter()
        self.begun_s = time.perf_counter()
        self.warm_s = self.begun_s + task.warm_s
        self.until_s = self.warm_s + task.seconds
        self.last_s = self.warm_s
        self.left = task.concurrency
        self.done = asyncio.get_running_loop().create_future()

    def over(self) -> None:
        """A connection has ended."""
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def found(self) -> SmallFound:
        ordered = sorted(self.took_s)
        per_s = len(ordered) / (self.last_s - self.warm_s) if ordered else 0.0
        p50, p99 = (quantile(ordered, share) * 1e3 for share in (0.5, 0.99))
        return SmallFound(p50, p99, per_s, self.answered, dict(self.wrong))


class Asker(asyncio.Protocol):
    """One connection; opened anew where the other side closes it."""

    transport: asyncio.Transport

    def __init__(self, run: Small) -> None:
        self._run, self._data, self._begun_s = run, b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self._ask()

    def _ask(self) -> None:
        self._begun_s = time.perf_counter()
        self.transport.write(self._run.bytes)

    def data_received(self, data: bytes) -> None:
        self._data = data = self._data + data if self._data else data
        if answer_end(data) is None:
            return
        run, now_s, self._data = self._run, time.perf_counter(), b""
        run.answered += 1
        if not data.startswith(ANSWERED):
            run.wrong[status(data)] += 1
        elif now_s >= run.warm_s:
            run.took_s.append(now_s - self._begun_s)
            run.last_s = now_s
        if now_s < run.until_s:
            self._ask()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if time.perf_counter() < self._run.until_s:
            if self._data:
                self._run.wrong["broken off"] += 1
            asyncio.get_running_loop().create_task(self._again())
        else:
            self._run.over()

    async def _again(self) -> None:
        await _connect(self._run, lambda: Asker(self._run))


async def _connect(run: Small | Streams, make: type[asyncio.Protocol] | object) -> None:
    try:
        await asyncio.get_running_loop().create_connection(make, "127.0.0.1", run.task.port)  # type: ignore[arg-type]
    except OSError as error:
        run.wrong[str(error)] += 1
        run.over()


async def small(task: SmallTask) -> SmallFound:
    """Ask for ``seconds``."""
    run = Small(task)
    for _ in range(task.concurrency):
        await _connect(run, lambda: Asker(run))
    try:
        async with asyncio.timeout(task.seconds + REST_S):
            await run.done
    except TimeoutError:
        run.wrong["no answer"] += run.left
    return run.found()


class Streams:
    """All streams of a run and what came of them."""

    def __init__(self, task: StreamTask) -> None:
        self.task, self.bytes = task, task.request.bytes()
        self.came = self.late = self.open = self.open_most = 0
        self.late_us = self.way_us = self.node_us = 0
        self.wrong: Counter[str] = Counter()
        self.left = task.count
        self.done = asyncio.get_running_loop().create_future()

    def over(self) -> None:
        """A stream has ended."""
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)

    def seen(self, due_us: int, sent_us: int, now_us: int) -> None:
        """A chunk has come."""
        self.came += 1
        late_us = now_us - due_us
        if late_us > LATE_US:
            self.late += 1
        if late_us > self.late_us:
            self.late_us = late_us
        if now_us - sent_us > self.way_us:
            self.way_us = now_us - sent_us
        if sent_us - due_us > self.node_us:
            self.node_us = sent_us - due_us

    def found(self) -> StreamFound:
        asked = self.task.count * self.task.chunks
        late_ms, way_ms, node_ms = (us / 1e3 for us in (self.late_us, self.way_us, self.node_us))
        late = self.late + asked - self.came
        return StreamFound(asked, self.came, late, late_ms, way_ms, node_ms, self.open_most, dict(self.wrong))


class Reader(asyncio.Protocol):
    """One stream on a connection of its own."""

    transport: asyncio.Transport

    def __init__(self, run: Streams) -> None:
        self._run, self._rest, self._last, self._open = run, b"", b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self.transport.write(self._run.bytes)

    def data_received(self, data: bytes) -> None:
        now_us, run = time.monotonic_ns() // 1000, self._run
        if not self._open:
            self._rest = data = self._rest + data
            if len(data) < len(ANSWERED):
                return
            self._rest = b""
            self._begin(data)
        self._last = data[-5:] if len(data) >= 5 else (self._last + data)[-5:]
        if self._rest:
            data = self._rest + data
        end = 0
        for stamp in STAMP.finditer(data):
            end = stamp.end()
            run.seen(int(stamp[1]), int(stamp[2]), now_us)
        self._rest = b"" if data.endswith(b"\n") else data[end:]
        if self._last == LAST:
            self.transport.abort()

    def _begin(self, data: bytes) -> None:
        self._open = True
        self._run.open += 1
        self._run.open_most = max(self._run.open, self._run.open_most)
        if not data.startswith(ANSWERED):
            self._run.wrong[status(data)] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.open -= self._open
        if self._last != LAST:
            self._run.wrong["broken off"] += 1
        self._run.over()


async def streams(task: StreamTask) -> StreamFound:
    """Open all streams one after the other and read them to their ends, or to the end of the time."""
    loop, run = asyncio.get_running_loop(), Streams(task)
    begun_s, opening = loop.time(), set()
    try:
        async with asyncio.timeout(task.limit_s):
            for number in range(task.count):
                await asyncio.sleep(begun_s + task.ramp_s * number / task.count - loop.time())
                opening.add(asyncio.create_task(_connect(run, lambda: Reader(run))))
            await run.done
    except TimeoutError:
        run.wrong["not at its end in time"] += run.left
    return run.found()


async def main(text: str) -> None:
    """Do what the task says."""
    task = json.loads(text)
    task["request"] = Request(**task["request"])
    found = await (small(SmallTask(**task)) if task["do"] == "small" else streams(StreamTask(**task)))
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
