"""One request and its response, byte by byte, with the fault that acts on it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Literal, Protocol

import h11

from tests.fakes.clock import clock_s
from tests.fakes.faults import GARBAGE, Fault

_PADDING = b'"padding":"'  #: how a long line is made long: a field that no client knows

UPLOAD_WINDOW_BYTES = 1 << 20
SHORT_BYTES = 10  #: what a Content-Length that is too small at the end leaves out
Outcome = Literal["open", "completed", "cancelled", "faulted"]


@dataclass(eq=False)
class Received:
    """What a node received, and what became of it."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    body_bytes: int = 0
    received_s: float = 0.0
    head_sent_s: float | None = None
    finished_s: float | None = None
    status: int | None = None
    sent_bytes: int = 0
    chunks: int = 0
    outcome: Outcome = "open"
    fault: Fault | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def header(self, name: str) -> str | None:
        """Return the first header of that name in any case."""
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    @property
    def json(self) -> Any:
        """The body as JSON (``None`` if empty)."""
        return json.loads(self.body) if self.body else None

    @property
    def model(self) -> str | None:
        """The model the body names, if it is a JSON object that names one."""
        return self.notes.get("model")


class Notice:
    """Wakes those who wait for a condition on the node's state."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def __call__(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once ``holds()``; raises TimeoutError after ``timeout_s``."""
        async with asyncio.timeout(timeout_s):
            while not holds():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                await waiter


class Aborted(Exception):
    """A fault ended the response; ``reuse`` says whether the connection goes on."""

    def __init__(self, reuse: bool = False) -> None:
        super().__init__("a fault ended the response")
        self.reuse = reuse


class Wire(Protocol):
    """What an exchange needs of its connection."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def send_continue(self) -> None: ...
    async def write(self, data: bytes) -> None: ...
    async def flush(self) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...
    def notice(self) -> None: ...


class Exchange:
    """One request and its response."""

    def __init__(self, connection: Wire, request: h11.Request) -> None:
        path, _, query = request.target.decode("latin-1").partition("?")
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.headers.raw_items()]
        self.record = Received(request.method.decode(), path, query, headers, received_s=clock_s())
        self.lower = {k.decode("latin-1"): v.decode("latin-1") for k, v in request.headers}
        self.fault: Fault | None = None
        self.error_chunk: Callable[[str], bytes] | None = None
        self.close = b"close" in dict(request.headers).get(b"connection", b"").lower()
        self.chunked = request.http_version == b"1.1"
        self.close |= not self.chunked
        self._connection = connection
        self._parts: deque[bytes] = deque()
        self._buffered = 0
        self._body_complete = False
        self._more = asyncio.Event()
        self._streaming = False
        self._held: list[bytes] | None = None
        #: Of a body that is not taken: with more, no more is read.
        self.window_bytes: float = UPLOAD_WINDOW_BYTES

    # the request's body

    def feed(self, data: bytes) -> None:
        """Take body bytes from the parser."""
        self._parts.append(data)
        self._buffered += len(data)
        self._more.set()
        if self._buffered > self.window_bytes:
            self._connection.pause_reading()

    def feed_eof(self) -> None:
        """Take the end of the body from the parser."""
        self._body_complete = True
        self._more.set()

    @property
    def body_complete(self) -> bool:
        """Whether the whole body has arrived (not: been consumed)."""
        return self._body_complete

    def discard(self) -> int:
        """Drop what is buffered of the body and return how much it was."""
        dropped, self._buffered = self._buffered, 0
        self._parts.clear()
        self._more.clear()
        self._connection.resume_reading()
        return dropped

    async def body_parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; a client that waits for ``100 Continue`` gets it first."""
        self._connection.send_continue()
        fault = self.fault if self.fault and self.fault.at == "mid_body" else None
        while True:
            while self._parts:
                part = self._parts.popleft()
                self._buffered -= len(part)
                self.record.body_bytes += len(part)
                if fault and self.record.body_bytes >= fault.bytes:
                    await self.act(fault)
                yield part
            self._connection.resume_reading()
            if self._body_complete:
                return
            self._more.clear()
            await self._more.wait()

    async def body(self) -> bytes:
        """Return the whole body and keep it in the record."""
        if self._body_complete and not self._parts:
            return self.record.body
        self.record.body = b"".join([part async for part in self.body_parts()])
        return self.record.body

    # the response

    async def respond(
        self, status: int, body: bytes = b"", content_type: str | None = None, **headers: str
    ) -> None:
        """Send a whole response with a Content-Length (no body for HEAD)."""
        fault = self.fault
        if fault is not None and fault.at == "mid_body":
            self.close = True  # the rest of the request is not read
        if fault is not None and fault.do in ("long", "long_cut") and fault.at != "before_head":
            return await self._respond_long(status, content_type, headers, body, fault)
        delta = fault.bytes if fault and fault.do == "length" else 0
        length = self._said_bytes([body], fault) if fault and fault.do == "short" else len(body) + delta
        head = self._head(status, content_type, headers, length=max(0, length))
        if self.record.method == "HEAD":
            body = b""
        if fault is None or fault.do == "short":
            await self.send(head + body)
        else:
            await self._send_head(head)
            if fault.at in ("after_chunks", "before_last"):
                await self.act(fault)
            if fault.at in ("mid_line", "before_end"):
                await self.send(body[: len(body) // 2 if fault.at == "mid_line" else -1])
                await self.act(fault)
            await self.send(body)
            if delta:
                await self.act(Fault("fin"))
        self.finish()

    async def start(self, content_type: str, status: int = 200, **headers: str) -> None:
        """Begin a stream: its head goes out with the first chunk."""
        self._streaming = True
        if self.fault and self.fault.do in ("length", "short"):
            self._held = []
            self._pending_type = content_type
            return
        head = self._head(status, content_type, headers, length=None)
        if self.fault is None:
            self._pending_head = head
        else:
            self._pending_head = b""
            await self._send_head(head)

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        """Send one object as one chunk; ``last`` marks the stream's final object."""
        if self._held is not None:
            self._held.append(data)
            return
        fault = self.fault
        if fault is not None:
            if fault.at == "mid_line" and fault.chunks == self.record.chunks:
                await self.send(self.frame(data[: len(data) // 2]))
                await self.act(fault)
            at_count = fault.at == "after_chunks" and fault.chunks == self.record.chunks
            if at_count or (fault.at == "before_last" and last):
                if fault.do in ("long", "long_cut"):
                    return await self._send_long(data, fault)
                if fault.do == "trickle":
                    self._trickling = True
                else:
                    await self.act(fault, data)
        self.record.chunks += 1
        await self.send(self._take_head() + self.frame(data))
        self._connection.notice()

    async def chunks(self, lines: list[bytes]) -> None:
        """Send several objects, one chunk each, in one write (the fast path)."""
        if self.fault is not None or self._held is not None:
            for line in lines:
                await self.chunk(line)
            return
        self.record.chunks += len(lines)
        await self.send(self._take_head() + b"".join(map(self.frame, lines)))
        self._connection.notice()

    async def end(self) -> None:
        """End a stream."""
        if self._held is not None:
            held, self._held = self._held, None
            fault, self.fault = self.fault, None
            assert fault is not None
            length = self._said_bytes(held, fault)
            body = b"".join(held)
            head = self._head(200, self._pending_type, {}, length=max(0, length))
            await self.send(head + body)
            if fault.do == "length":
                await self.act(Fault("fin"))
            return self.finish()
        if self.fault and self.fault.at in ("before_end", "after_chunks", "mid_line") and not self._trickling:
            await self.act(self.fault)
        await self.send(self._take_head() + (b"0\r\n\r\n" if self.chunked else b""))
        self.finish()

    def frame(self, data: bytes) -> bytes:
        """Return ``data`` as one chunk (as it is, for HTTP/1.0)."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data

    def finish(self) -> None:
        """Note that the whole response was handed to the transport."""
        self.record.outcome = "completed"

    async def send(self, data: bytes) -> None:
        """Send raw bytes, as the fault (if any) lets them through."""
        fault = self.fault
        if fault is None:
            await self._connection.write(data)
        elif fault.at == "after_bytes" and self.record.sent_bytes + len(data) >= fault.bytes:
            await self._connection.write(data[: fault.bytes - self.record.sent_bytes])
            self.record.sent_bytes = fault.bytes
            await self.act(fault)
        elif fault.do == "trickle" and (fault.at == "before_head" or self._trickling):
            for start in range(0, len(data), fault.bytes):
                await self._connection.write(data[start : start + fault.bytes])
                await asyncio.sleep(fault.interval_s)
        else:
            await self._connection.write(data)
        self.record.sent_bytes += len(data)

    async def act(self, fault: Fault, data: bytes = b"") -> None:
        """Do what ``fault`` says; always raises :class:`Aborted` (or hangs until the client leaves).

        ``data`` is what would have come next.
        """
        self.record.outcome = "faulted"
        self._connection.notice()
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.gate is not None:
            await fault.gate.wait()
        connection = self._connection
        self.fault = None
        if fault.do == "hang":
            await asyncio.get_running_loop().create_future()
        if fault.do == "error" and self._streaming and self.error_chunk is not None:
            self.record.chunks += 1
            await self.send(self._take_head() + self.frame(self.error_chunk(fault.text)))
        if fault.do in ("error", "end") and self._streaming:
            await self.send(self._take_head() + (b"0\r\n\r\n" if self.chunked else b""))
            raise Aborted(reuse=True)
        if fault.do == "garbage":
            await connection.write(GARBAGE)
        elif fault.do == "cut_chunk":
            await connection.write(self.frame(data)[: len(data) // 2] if data else b"0\r\n")
        elif fault.do == "bad_chunk":
            await connection.write(b"size\r\n" + data + b"\r\n")
        await connection.flush()
        if fault.do == "rst":
            connection.reset()
        else:
            connection.close()
        raise Aborted

    def _take_head(self) -> bytes:
        head, self._pending_head = self._pending_head, b""
        return head

    async def _send_head(self, head: bytes) -> None:
        fault = self.fault
        assert fault is not None
        if fault.at == "mid_head":
            await self.send(head[: len(head) // 2])
            await self.act(fault)
        if fault.at == "before_head" and fault.do in ("long", "long_cut"):
            status_line, _, rest = head.partition(b"\r\n")
            long = status_line + b"\r\nX-Long: " + b"x" * fault.bytes + b"\r\n"
            if fault.do == "long_cut":
                await self.send(long[: len(long) // 2])
                await self.act(Fault("rst"))
            head = long + rest
        await self.send(head)
        if fault.at == "after_head":
            if fault.do == "trickle":
                self._trickling = True
            else:
                await self.act(fault)

    def _head(
        self, status: int, content_type: str | None, headers: dict[str, str], length: int | None
    ) -> bytes:
        self.record.status = status
        self.record.head_sent_s = clock_s()
        self._connection.notice()
        lines = [f"HTTP/1.1 {status} {_reason(status)}"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        if content_type:
            lines.append(f"Content-Type: {content_type}")
        lines.append(f"Date: {formatdate(usegmt=True)}")
        if length is not None:
            lines.append(f"Content-Length: {length}")
        elif self.chunked:
            lines.append("Transfer-Encoding: chunked")
        if self.close:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _said_bytes(self, body: list[bytes], fault: Fault) -> int:
        """The Content-Length that ``fault`` lies about a body of these pieces."""
        total = sum(map(len, body))
        if fault.do == "length":
            return total + fault.bytes
        if fault.at == "after_head":
            return 0
        if fault.at == "before_end":
            return total - SHORT_BYTES
        before = body[: fault.chunks] if len(body) > 1 else []
        return sum(map(len, before)) + len(body[len(before)]) // 2

    async def _send_long(self, data: bytes, fault: Fault) -> None:
        """Send an object as a line that is as long as ``fault`` says, or the first half of that line."""
        line = _padded(data, fault.bytes)
        if fault.do == "long":
            self.fault = None
            return await self.chunk(line)
        await self.send(self._take_head() + self.frame(line[: len(line) // 2]))
        await self.act(Fault("rst"))

    async def _respond_long(
        self, status: int, content_type: str | None, headers: dict[str, str], body: bytes, fault: Fault
    ) -> None:
        """Send a whole response that is as long as ``fault`` says, or the first half of it."""
        body, self.fault = _padded(body, fault.bytes), None
        head = self._head(status, content_type, headers, length=len(body))
        if fault.do == "long":
            await self.send(head + body)
            return self.finish()
        await self.send(head + body[: len(body) // 2])
        await self.act(Fault("rst"))

    _trickling = False
    _pending_head: bytes = b""
    _pending_type: str = ""


def _padded(data: bytes, size: int) -> bytes:
    """``data`` with ``size`` bytes more: in its object, or as a comment of the event stream."""
    before, brace, after = data.partition(b"{")
    if not brace:
        return b": " + b"x" * size + b"\n" + data
    return before + brace + _PADDING + b"x" * size + b'",' + after


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "status code"
