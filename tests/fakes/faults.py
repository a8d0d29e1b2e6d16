"""Failures on command, each at each moment.

A :class:`Fault` waits on a node until requests match it, and acts on the next ``times`` of them (``None``:
until cleared). *When* it acts is counted on the response's own bytes or chunks, *what* it does is its action.
The functions below make the usual ones; ``path`` is a glob (``/api/chat``, ``/api/*``, ``*``).

====================  ====================================================================================
moment (``at``)       the response so far
====================  ====================================================================================
``connect``           nothing; the connection was accepted, and nothing read of it
``accept``            nothing; the request is not even read (acts on the connection's first bytes)
``mid_body``          nothing; ``bytes`` bytes of the request's body were read
``before_head``       nothing; the request was read and recorded
``mid_head``          the first half of the status line and headers
``after_head``        status line and headers (which Ollama sends only with the first chunk)
``mid_line``          headers, ``chunks`` whole chunks, and the first half of the next
``after_chunks``      headers and ``chunks`` whole chunks
``before_last``       everything but the last object (``done:true``, ``[DONE]``, ``message_stop``)
``before_end``        everything but the terminal chunk ``0\\r\\n\\r\\n`` (or the last byte of a length)
``after_bytes``       exactly ``bytes`` bytes of the response, headers included
====================  ====================================================================================

====================  ====================================================================================
action (``do``)       what happens then
====================  ====================================================================================
``rst``               the connection is reset (SO_LINGER 0)
``fin``               the connection is closed in order
``hang``              silence; the connection stays open until the client leaves
``garbage``           bytes that are no HTTP, then FIN
``error``             a last error in the shape that Ollama's surface uses mid-stream, then a clean end
``end``               a clean end of the body, with no last object
``reply``             ``status`` with ``text`` instead of the answer (before the head; ``mid_body``: before
                      the request's body was read, as Go does it: most of it stays unread, then FIN)
``trickle``           from there on, the answer in pieces of ``bytes`` bytes every ``interval_s``
``length``            a Content-Length that is ``bytes`` larger (or smaller) than the body, then FIN
``short``             a Content-Length that says that the body ends there; the rest comes all the same, and
                      the connection stays open
``cut_chunk``         half of a chunk (of the terminal one ``before_end``), then FIN
``bad_chunk``         a chunk whose size is no number, then FIN
``long``              a header field (``before_head``) or a line of ``bytes`` bytes more
``long_cut``          the first half of that, then a reset
====================  ====================================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Moment = Literal[
    "connect",
    "accept",
    "mid_body",
    "before_head",
    "mid_head",
    "after_head",
    "mid_line",
    "after_chunks",
    "before_last",
    "before_end",
    "after_bytes",
]
Action = Literal[
    "rst",
    "fin",
    "hang",
    "garbage",
    "error",
    "end",
    "reply",
    "trickle",
    "length",
    "short",
    "cut_chunk",
    "bad_chunk",
    "long",
    "long_cut",
]

#: Those that shape the answer where it is made, instead of ending it at a moment.
SHAPING = frozenset({"reply", "trickle", "length", "short", "long", "long_cut"})

GARBAGE = b"\x16\x03\x01\x02\x00this is no HTTP\r\n\x00\xff\xfe\r\n\r\n"

#: Error texts of Ollama by what they mean, with the status and the path they come on (v0.33 and v0.24).
TEXTS: dict[str, tuple[int, str]] = {
    "busy": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "oom_startup": (500, "llama-server reported out-of-memory during startup: cudaMalloc failed"),
    "oom_cuda": (500, "cudaMalloc failed: out of memory"),
    "terminated": (500, "llama-server process has terminated: exit status 2"),
    "no_longer_running": (500, "llama-server process no longer running: -1 "),
    "load_timeout": (500, "timed out waiting for llama-server to start - progress 0.00 - "),
    "start_failed": (500, "error starting llama-server: fork/exec: resource temporarily unavailable"),
    "runner_stopped": (500, "model runner has unexpectedly stopped, this may be due to resource limitations"),
    "bad_status": (500, "unexpected server status: 1"),
    "no_slots": (500, "no slots available after 10 retries"),
    "needs_more": (500, "model requires 40.0 GiB but only 22.1 GiB are available"),
    "not_full_gpu": (500, "unable to load full model on GPU"),
    "v024_memory": (500, "model requires more system memory (40.0 GiB) than is available (22.1 GiB)"),
    "v024_terminated": (500, "llama runner process has terminated: signal: killed"),
    "v024_not_running": (500, "llama runner process no longer running: -1 "),
    "v024_timeout": (500, "timed out waiting for llama runner to start - progress 0.00 - "),
    "v024_load": (500, "model failed to load, this may be due to resource limitations"),
    "embed_request": (400, "do embedding request: Post \"http://127.0.0.1:1/embedding\": EOF"),
    "embed_not_running": (400, "llama-server process no longer running: -1 "),
}  # fmt: skip


@dataclass
class Fault:
    """One failure: what happens (``do``), when (``at``), to which requests and how often."""

    do: Action
    at: Moment = "before_head"
    path: str = "*"
    method: str = "*"
    times: int | None = 1
    status: int = 500
    text: str = "injected fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    chunks: int = 0
    interval_s: float = 0.001
    delay_s: float = 0.0
    gate: asyncio.Event | None = None  # waited for before it acts
    hits: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Return whether this fault still waits for such a request."""
        if self.times is not None and self.hits >= self.times:
            return False
        return fnmatchcase(path, self.path) and fnmatchcase(method, self.method)


def rst(at: Moment = "before_head", **where: object) -> Fault:
    """Return a reset at ``at``; ``where`` are further fields of :class:`Fault`."""
    return Fault("rst", at, **where)  # type: ignore[arg-type]


def fin(at: Moment = "before_head", **where: object) -> Fault:
    """Return an orderly close at ``at``."""
    return Fault("fin", at, **where)  # type: ignore[arg-type]


def hang(at: Moment = "before_head", **where: object) -> Fault:
    """Return a silence from ``at`` on."""
    return Fault("hang", at, **where)  # type: ignore[arg-type]


def garbage(at: Moment = "before_head", **where: object) -> Fault:
    """Return bytes that are no HTTP instead of (or in the middle of) the answer."""
    return Fault("garbage", at, **where)  # type: ignore[arg-type]


def reply(status: int, text: str, **where: object) -> Fault:
    """Return an answer of ``status`` whose error, in the shape of the surface asked, is ``text``."""
    return Fault("reply", "before_head", status=status, text=text, **where)  # type: ignore[arg-type]


def named(name: str, **where: object) -> Fault:
    """Return the answer that :data:`TEXTS` lists under ``name``."""
    status, text = TEXTS[name]
    return reply(status, text, **where)


def error_line(text: str = "an error was encountered while running the model", **where: object) -> Fault:
    """Return a mid-stream error after ``chunks`` chunks (0: the very first line of a 200)."""
    return Fault("error", "after_chunks", text=text, **where)  # type: ignore[arg-type]


def no_done(**where: object) -> Fault:
    """Return a clean end of the body without the last object."""
    return Fault("end", "before_last", **where)  # type: ignore[arg-type]


def trickle(size: int = 7, interval_s: float = 0.001, **where: object) -> Fault:
    """Return an answer that comes in pieces of ``size`` bytes, every ``interval_s``."""
    return Fault("trickle", bytes=size, interval_s=interval_s, **where)  # type: ignore[arg-type]


def early(status: int, text: str, **where: object) -> Fault:
    """Return an answer as of :func:`reply` that comes before the request's body was read."""
    return Fault("reply", "mid_body", status=status, text=text, **where)  # type: ignore[arg-type]


def long_line(size: int, at: Moment = "after_head", *, cut: bool = False, **where: object) -> Fault:
    """Return a line (a header field ``before_head``) that is ``size`` bytes longer; ``cut``: half of it."""
    return Fault("long_cut" if cut else "long", at, bytes=size, **where)  # type: ignore[arg-type]


def wrong_length(delta: int = 10, **where: object) -> Fault:
    """Return a body whose Content-Length is wrong by ``delta`` bytes."""
    return Fault("length", bytes=delta, **where)  # type: ignore[arg-type]
