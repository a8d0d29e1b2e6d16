"""The node of the proxy benchmark: it answers at once or streams by a schedule, and costs little.

What a request's prompt says is done: ``[[chunks:100 per_s:20 hold:0]]`` streams 100 chunks, each stamped
``@DUE:SENT@``, the moment when it was due and the one when it was sent (µs of CLOCK_MONOTONIC, which all
processes of a machine share). With ``hold:3`` the rest after three chunks waits for ``/bench/release``, and
``/bench/last`` tells what the body was: so a check needs no times. Everything else is a fixed answer.

Prints its port, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from dataclasses import dataclass
from typing import cast

import uvloop

MODELS = ("llama3.2:latest", "embed:latest")
BACKLOG = 4096
PLAN = re.compile(rb"\[\[chunks:(\d+) per_s:([\d.]+) hold:(\d+)\]\]")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CLOSING = re.compile(rb"^[^\r]* HTTP/1\.0\r|\r\nconnection: *close", re.IGNORECASE)
STREAM_ASKED = re.compile(rb'"stream": *true')
STREAM_REFUSED = re.compile(rb'"stream": *false')

NAME, WHEN, DIGEST = b'"model":"llama3.2"', b"2026-01-01T00:00:00Z", b"0" * 64
STATISTICS = (
    b'"done_reason":"stop","total_duration":1000000,"load_duration":1000,"prompt_eval_count":8,'
    b'"prompt_eval_duration":100000,"eval_count":8,"eval_duration":800000'
)
DETAILS = (
    b'"details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],'
    b'"parameter_size":"3.2B","quantization_level":"Q4_K_M"}'
)


@dataclass(frozen=True)
class Shape:
    """How a stream is written: what stands around each token's text, and at the end."""

    kind: bytes
    before: bytes
    after: bytes
    end: bytes


_MADE = NAME + b',"created_at":"' + WHEN + b'"'
_PART = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1767225600,' + NAME
SHAPES = {
    b"/api/chat": Shape(
        b"application/x-ndjson",
        b"{" + _MADE + b',"message":{"role":"assistant","content":"',
        b'"},"done":false}\n',
        b"{" + _MADE + b',"message":{"role":"assistant","content":""},"done":true,' + STATISTICS + b"}\n",
    ),
    b"/api/generate": Shape(
        b"application/x-ndjson",
        b"{" + _MADE + b',"response":"',
        b'","done":false}\n',
        b"{" + _MADE + b',"response":"","done":true,' + STATISTICS + b"}\n",
    ),
    b"/v1/chat/completions": Shape(
        b"text/event-stream",
        _PART + b',"choices":[{"index":0,"delta":{"role":"assistant","content":"',
        b'"},"finish_reason":null}]}\n\n',
        _PART
        + b',"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    ),
}


def _listed(more: bytes) -> bytes:
    one = (
        b'{"name":"%b","model":"%b","modified_at":"'
        + WHEN
        + b'","size":2000000000,"digest":"'
        + DIGEST
        + b'",'
    )
    rows = (one % (name.encode(), name.encode()) + more + b"}" for name in MODELS)
    return b'{"models":[' + b",".join(rows) + b"]}"


_RESIDENT = b',"expires_at":"2099-01-01T00:00:00Z","size_vram":2000000000,"context_length":4096'
_USAGE = b'"usage":{"prompt_tokens":8,"completion_tokens":1,"total_tokens":9}'
#: Path → body of what is not streamed.
FIXED = {
    b"/api/embed": b'{"model":"embed","embeddings":[[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8]],'
    b'"total_duration":1000000,"load_duration":1000,"prompt_eval_count":2}',
    b"/api/chat": b"{" + _MADE + b',"message":{"role":"assistant","content":"Hi"},"done":true,'
    + STATISTICS + b"}",
    b"/api/generate": b"{" + _MADE + b',"response":"Hi","done":true,' + STATISTICS + b"}",
    b"/v1/chat/completions": b'{"id":"chatcmpl-1","object":"chat.completion","created":1767225600,' + NAME
    + b',"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],'
    + _USAGE + b"}",
    b"/api/tags": _listed(DETAILS),
    b"/api/ps": _listed(DETAILS + _RESIDENT),
    b"/api/version": b'{"version":"0.12.6"}',
    b"/api/show": b"{" + DETAILS + b',"capabilities":["completion"],"model_info":{'
    b'"general.architecture":"llama","general.parameter_count":3200000000,"llama.context_length":131072,"llama.block_count":28,'
    b'"llama.embedding_length":3072,"llama.attention.head_count":24,"llama.attention.head_count_kv":8}}',
}  # fmt: skip


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer with a length."""
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


ANSWERS = {path: whole(body) for path, body in FIXED.items()}
MISSING = whole(b'{"error":"not found"}', b"404 Not Found")


def unchunked(data: bytes, start: int) -> tuple[bytes, int] | None:
    """The body of a chunked request and where it ends; None while the end has not come."""
    body = b""
    while (line := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:line].partition(b";")[0], 16)
        start = line + 2 + size + 2
        if len(data) < start:
            return None
        if not size:
            return body, start
        body += data[line + 2 : start - 2]
    return None


def taken(data: bytes) -> tuple[bytes, bytes, int] | None:
    """The first request's head and body and where it ends; None while it has not come whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head, start = data[: end + 2], end + 4
    if length := LENGTH.search(head):
        end = start + int(length[1])
        return (head, data[start:end], end) if len(data) >= end else None
    if CHUNKED.search(head):
        found = unchunked(data, start)
        return (head, *found) if found else None
    return head, b"", start


class Held:
    """The one stream that a check holds or may yet hold, and what the last such stream was."""

    stream: Stream | None = None
    body = b""


class Stream:
    """One answer in pieces."""

    def __init__(self, connection: Connection, shape: Shape, chunks: int, per_s: float, hold: int) -> None:
        self._connection, self._shape = connection, shape
        self._left, self._step_s, self._hold = chunks, 1 / per_s, hold
        self._loop = asyncio.get_running_loop()
        self._body, self._held = bytearray() if hold else None, False
        if hold:
            Held.stream = self
        connection.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % shape.kind
        )
        self._due_s = time.monotonic() + self._step_s
        self._timer = self._loop.call_later(self._step_s, self._tick)

    def stop(self) -> None:
        """Send no more: nobody is there."""
        self._timer.cancel()
        if Held.stream is self:
            Held.stream = None

    def release(self) -> None:
        """Go on after the hold, or do not hold at all."""
        self._hold = 0
        if self._held:
            self._due_s = time.monotonic()
            self._tick()

    def _tick(self) -> None:
        while self._left:
            now_s = time.monotonic()
            text = b" @%d:%d@" % (self._due_s * 1e6, now_s * 1e6)
            self._send(self._shape.before + text + self._shape.after)
            self._left -= 1
            self._due_s += self._step_s
            if self._hold:
                self._hold -= 1
                if not self._hold:
                    self._held = True
                    return
            if self._due_s > now_s:
                self._timer = self._loop.call_later(self._due_s - now_s, self._tick)
                return
        self._send(self._shape.end)
        if self._body is not None:
            Held.body, Held.stream = bytes(self._body), None
        self._connection.transport.write(b"0\r\n\r\n")
        self._connection.ended()

    def _send(self, piece: bytes) -> None:
        if self._body is not None:
            self._body += piece
        self._connection.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class Connection(asyncio.Protocol):
    """A client of the node; its requests one after the other."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._data = b""
        self._stream: Stream | None = None
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream is not None:
            self._stream.stop()

    def data_received(self, data: bytes) -> None:
        self._data += data
        self._go_on()

    def ended(self) -> None:
        """The stream is over: the next request may be answered."""
        self._stream = None
        if self._closing:
            self.transport.close()
        else:
            self._go_on()

    def _go_on(self) -> None:
        while self._data and self._stream is None and (request := taken(self._data)):
            head, body, end = request
            self._data = self._data[end:]
            self._closing = CLOSING.search(head) is not None
            self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        shape = SHAPES.get(path)
        if shape and _streamed(path, body):
            plan = PLAN.search(body)
            chunks, per_s, hold = (int(plan[1]), float(plan[2]), int(plan[3])) if plan else (1, 1000.0, 0)
            self._stream = Stream(self, shape, chunks, per_s, hold)
            return
        if path == b"/bench/last":
            answer = whole(Held.body)
        elif path == b"/bench/release":
            answer = whole(b"{}")
            if Held.stream is not None:
                Held.stream.release()
        else:
            answer = ANSWERS.get(path, MISSING)
        self.transport.write(answer)
        if self._closing:
            self.transport.close()


def _streamed(path: bytes, body: bytes) -> bool:
    """OpenAI's answers are whole unless a client asks otherwise; Ollama's are streamed."""
    return bool(STREAM_ASKED.search(body) if path.startswith(b"/v1/") else not STREAM_REFUSED.search(body))


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=BACKLOG)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(server.sockets[0].getsockname()[1], flush=True)
    await reader.read()


if __name__ == "__main__":
    uvloop.run(main())
