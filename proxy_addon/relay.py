"""The answer on its way to the client: judged at its first bytes, passed on as it comes, checked at its end.

Nothing is buffered but what cannot be shown yet: the first line of a stream (an error there is still
replaceable), an incomplete line (a node that dies in mid-line must not leave half an object behind), and an
answer that is not a stream (it comes at once, at the end). The last pieces are kept by reference to read the
final statistics; nothing is parsed per token.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Literal

import orjson
from mitmproxy import http

from proxy_addon import errors, record, routing_metadata
from proxy_addon.endpoints import Handling
from proxy_addon.heads import first
from proxy_addon.lane.framing import Chunked
from proxy_addon.record import FinalStats

#: A whole answer larger than this is let through before its end; so is a first or partial line.
HOLD_WHOLE_BYTES = 32 << 20
HOLD_LINE_BYTES = 64 << 10

Framing = Literal["ndjson", "sse", "whole", "opaque"]
Verdict = Literal["wait", "release", "first_line", "empty"]

#: What the end of a complete stream contains. Escaped quotes cannot match inside a JSON string; an error that
#: is null is none (every event of /v1/responses has one).
_ERROR = rb'"error"\s*:\s*[{"]'
_END = {
    "/api/generate": rb'"done"\s*:\s*true|' + _ERROR,
    "/api/chat": rb'"done"\s*:\s*true|' + _ERROR,
    "/v1/chat/completions": rb"data: \[DONE\]|" + _ERROR,
    "/v1/completions": rb"data: \[DONE\]|" + _ERROR,
    "/v1/responses": rb'(?:event: |"type"\s*:\s*")response\.(?:completed|failed|incomplete)|' + _ERROR,
    "/v1/messages": rb'(?:event: |"type"\s*:\s*")message_stop|event: error|' + _ERROR,
}
END = {path: re.compile(pattern) for path, pattern in _END.items()}

_FRAMING: tuple[tuple[str, Framing], ...] = (
    ("application/x-ndjson", "ndjson"),
    ("text/event-stream", "sse"),
    ("application/json", "whole"),
)
_SEPARATOR: dict[Framing, bytes] = {"ndjson": b"\n", "sse": b"\n\n"}

#: A line with this is kept for the end, whose hook lets the fleet know what it says: clients go on when they
#: read it, and what they have made must be there.
_LAST = {"/api/create": b'"success"'}


def framing_of(response: http.Response) -> Framing:
    """How an answer is divided, by its content type."""
    content_type = first(response.headers, b"content-type")
    return next((framing for prefix, framing in _FRAMING if content_type.startswith(prefix)), "opaque")


def judge_start(framing: Framing, held: bytes | bytearray, ended: bool) -> tuple[Verdict, str]:
    """Whether the first bytes of a 2xx answer may go to the client.

    Returns ``wait`` until enough is there, ``release``, ``empty`` for a stream without a byte, or
    ``first_line`` with the node's sentence for a stream that begins with an error.
    """
    if framing == "whole":
        if not ended:
            return ("release", "") if len(held) > HOLD_WHOLE_BYTES else ("wait", "")
        # A Content-Length that is too small looks like an end; every whole answer is one object.
        return ("release", "") if held[-8:].rstrip().endswith(b"}") else ("empty", "its answer is not whole")
    separator = _SEPARATOR.get(framing)
    if separator is None:
        return ("release", "") if held or ended else ("wait", "")
    end = held.find(separator)
    if end < 0 and not ended and len(held) <= HOLD_LINE_BYTES:
        return "wait", ""
    if not held:
        return "empty", "the node ended its answer before it began"
    first = bytes(held[: end if end >= 0 else len(held)])
    if framing == "sse" and b'"model":""' in first:
        return "empty", "its answer began with an error"  # which Ollama's OpenAI surface turns into this
    text = _error_of(framing, first)
    return ("first_line", text) if text is not None else ("release", "")


def _error_of(framing: Framing, line: bytes) -> str | None:
    """The node's sentence if ``line`` is an error object and nothing else, else None."""
    if b'"error"' not in line:
        return None
    start = line.find(b"{")
    try:
        error = orjson.loads(line[start:]).get("error") if start >= 0 else None
    except (orjson.JSONDecodeError, AttributeError):
        return None
    if isinstance(error, dict):
        error = error.get("message")
    return str(error) if error else None


def judge(flow: http.HTTPFlow, held: bytes | bytearray, ended: bool) -> tuple[Verdict, str]:
    """:func:`judge_start` for the answer of ``flow``."""
    rec, response = record.of(flow), flow.response
    if rec is None or response is None or rec.endpoint is None or rec.endpoint.handling is not Handling.ROUTE:
        return "release", ""
    if rec.moving and not ended:
        return "wait", ""  # it will break off: whatever comes until then must not be begun with
    framing = framing_of(response)
    if framing == "whole" and rec.ask is not None and rec.ask.stream:
        framing = "ndjson" if rec.protocol == "native" else "opaque"
    if first(response.headers, b"content-encoding"):
        framing = "opaque"  # as it is, nothing of it can be read
    return judge_start(framing, held, ended)


class Tee:
    """What mitmproxy calls with every piece of a streamed answer, and with ``b""`` at its end."""

    __slots__ = (
        "_annotate", "_end", "_final", "_last", "_now", "_partial", "_rec", "_separator", "_whole_chunk",
        "dirty",
    )  # fmt: skip

    def __init__(
        self, rec: record.Record, framing: Framing, now: Callable[[], float], annotate: bool = False
    ) -> None:
        self._annotate = annotate and framing in ("ndjson", "whole")
        self._rec = rec
        self._separator = _SEPARATOR.get(framing) if rec.ask is not None and rec.ask.stream else None
        self._final = _LAST.get(rec.endpoint.path) if rec.endpoint else None
        if self._final is not None:
            self._separator = b"\n"  # also of an answer in one piece, which its length ends before the hook
        self._end = END.get(rec.endpoint.path) if rec.endpoint and self._separator else None
        self._whole_chunk = (self._separator or b"") + b"\r\n"  # how a chunk of whole lines ends
        self._partial = b""
        self._last: deque[tuple[bytes, bool]] = deque(maxlen=4)  # and whether it has its framing still
        self._now = now
        self.dirty = False  #: the client has seen half a line

    def __call__(self, data: bytes) -> bytes | tuple[()]:
        """Returns what the client is sent now; nothing is ``()``, for an empty chunk would end the body."""
        if not data:
            return self._finish()
        now_s = self._came()
        separator = self._separator
        if separator is not None and (
            self._partial or self.dirty or self._final or not data.endswith(separator)
        ):
            data = self._whole_lines(self._partial + data, separator)
            if not data:
                return ()
        self._last.append((data, False))
        return self._annotated(data, now_s) if self._annotate else data

    def passes(self, chunks: bytes) -> bool:
        """Whether ``chunks``, whole ones of a chunked body with their framing, may go out as they are.

        Then they count as sent; if not, their payload has to come through a call.
        """
        if self._partial or self.dirty or self._annotate or not chunks.endswith(self._whole_chunk):
            return False
        if self._final:
            return False
        rec = self._rec
        rec.last_byte_s = self._now()
        if rec.first_byte_s is None:
            self._came()
        self._last.append((chunks, True))
        return True

    def _came(self) -> float:
        rec = self._rec
        rec.last_byte_s = now_s = self._now()
        if rec.first_byte_s is None:
            rec.first_byte_s = now_s
            if rec.flight is not None:
                rec.flight.answered(now_s)
        return now_s

    def _annotated(self, data: bytes, now_s: float) -> bytes:
        if self._separator is None:
            self._annotate = False  # a whole answer comes in one piece, unless it is too large to hold
            final = len(data) <= HOLD_WHOLE_BYTES
        else:
            final = routing_metadata.is_final(data)
        return routing_metadata.add(data, self._rec, now_s) if final else data

    def _whole_lines(self, data: bytes, separator: bytes) -> bytes:
        """What of ``data`` may go out: up to its last separator; all of it if a line is too long to hold."""
        before = data.find(self._final) if self._final else -1
        found = data.rfind(separator, 0, before) if before >= 0 else data.rfind(separator)
        cut = found + len(separator) if found >= 0 else 0
        if len(data) - cut > HOLD_LINE_BYTES:
            cut = len(data)
        if cut:
            self.dirty = not data[:cut].endswith(separator)
        self._partial = data[cut:]
        return data[:cut]

    def _finish(self) -> bytes:
        """The stream ended cleanly: say so if its final object is missing."""
        rest, self._partial = self._partial, b""
        torn = bool(rest) and not rest.rstrip().endswith((b"}", b"[DONE]"))
        if torn:
            rest = b""  # half an object, which has no separator because it has no end
        if rest:
            self._last.append((rest, False))
        tail = self.tail
        self._rec.stats = read_stats(tail)
        if self._end is not None and (torn or not self._end.search(tail)):
            self._rec.outcome = "cut"
            return rest + self.cut("the node ended its answer before the final object")
        return rest

    @property
    def complete(self) -> bool:
        """The final object has gone out."""
        return self._end is not None and self._end.search(self.tail) is not None

    @property
    def tail(self) -> bytes:
        """The last pieces, joined."""
        return b"".join([Chunked().feed(data) if framed else data for data, framed in self._last])

    def cut(self, reason: str) -> bytes:
        """The bytes that end this stream after the node failed: on a line of its own, in its protocol."""
        separator = self._separator or b"\n"
        self._partial = b""
        message = f"{reason} (request id {self._rec.id})"
        return (separator if self.dirty else b"") + errors.stream_tail(
            self._rec.protocol, message, self._rec.id
        )


def cut(flow: http.HTTPFlow, reason: str) -> bytes | None:
    """The tail for a streamed answer whose node failed with ``reason``; None where the framing has no room.

    A body with a Content-Length cannot be ended early in a way that a client would take for whole, so there
    the connection is closed instead.
    """
    rec, response = record.of(flow), flow.response
    if rec is None or response is None or not isinstance(response.stream, Tee):
        return None
    rec.outcome = "cut"
    if "chunked" not in response.headers.get("transfer-encoding", "").lower():
        return None
    if rec.ask is None or not rec.ask.stream:
        return None
    if response.stream.complete:  # nothing is missing but the mark of the body's end
        rec.outcome, rec.stats = "ok", read_stats(response.stream.tail)
        return b""
    node = rec.attempts[-1].node if rec.attempts else "the node"
    return response.stream.cut(f"{node} failed in mid-answer: {rec.abort_reason or reason}")


_NUMBERS = re.compile(
    rb'"(total_duration|load_duration|prompt_eval_count|prompt_eval_duration|eval_count|eval_duration|'
    rb'prompt_tokens|completion_tokens|input_tokens|output_tokens)"\s*:\s*(\d{1,18})(?!\d)'
)
_REASON = re.compile(rb'_reason"\s*:\s*"([^"]*)"')  #: done_, finish_ or stop_; found in a quarter of the time
_NS_PER_S = 1e9


def read_stats(tail: bytes) -> FinalStats | None:
    """The final statistics in the last bytes of an answer of any of the protocols; None if it has none.

    By pattern, not by parsing: a final object can carry a context of megabytes, and its numbers come last.
    """
    found = {name: int(value) for name, value in _NUMBERS.findall(tail)}
    reasons = _REASON.findall(tail)
    if not found and not reasons:
        return None
    get = found.get
    return FinalStats(
        prompt_tokens=get(b"prompt_eval_count", get(b"prompt_tokens", get(b"input_tokens"))),
        output_tokens=get(b"eval_count", get(b"completion_tokens", get(b"output_tokens"))),
        load_s=_seconds(get(b"load_duration")),
        prefill_s=_seconds(get(b"prompt_eval_duration")),
        decode_s=_seconds(get(b"eval_duration")),
        total_s=_seconds(get(b"total_duration")),
        done_reason=reasons[-1].decode("ascii", "replace") if reasons else None,
    )


def _seconds(duration_ns: int | None) -> float | None:
    return None if duration_ns is None else duration_ns / _NS_PER_S
