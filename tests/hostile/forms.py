"""Hostile requests as data: the bytes, what the client must see, and what a node may be asked.

Every attack is sent on a connection of its own and read to the connection's end, so that a proxy that closes
too late, or answers what was never asked, is seen. ``answers`` are the status codes in their order. Where the
connection goes on after the attack, :data:`LAST` is sent behind it, whose answer ends the connection.

Sources of the cases: RFC 9112 (what it tells servers to reject), and the published desynchronisation
techniques (CL.TE, TE.CL, TE.TE, 0.CL, sizes and extensions of chunks).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import orjson

BODY = orjson.dumps(
    {"model": "llama3.2", "stream": False, "messages": [{"role": "user", "content": "[[n:1]] a"}]}
)
#: What an attacker wants a node to get behind the proxy's back: no node may ever see it.
SMUGGLED = (
    b"DELETE /api/delete HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n" + b'{"model":"llama3.2"}'
)
#: Ends the connection, and shows that client and proxy still agree on where requests begin.
LAST = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHAT = ("POST", "/api/chat")
MIB = 1 << 20


@dataclass(frozen=True)
class Attack:
    """What is sent, and what must come of it."""

    name: str
    sent: bytes
    answers: tuple[int, ...] = (400,)  #: statuses the client sees until the connection ends
    reaches: tuple[tuple[str, str], ...] = ()  #: requests, besides polls, that the nodes may get
    protocol: str = "native"  #: in whose shape the refusal is


def head(
    line: str | bytes = b"POST /api/chat HTTP/1.1", *fields: str | bytes, host: bytes = b"localhost"
) -> bytes:
    """A request's head of these very bytes; Host comes first."""
    rows = [line, *([b"Host: " + host] if host else []), *fields]
    return b"\r\n".join(row.encode("latin-1") if isinstance(row, str) else row for row in rows) + b"\r\n\r\n"


def post(*fields: str | bytes, body: bytes = BODY, path: str = "/api/chat") -> bytes:
    """A POST with fields and body as given: no length is added."""
    return head(f"POST {path} HTTP/1.1", *fields) + body


def sized(body: bytes, path: str = "/api/chat", *fields: str | bytes) -> bytes:
    """A well-framed POST of ``body``."""
    return post(f"Content-Length: {len(body)}", *fields, body=body, path=path)


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n", size: str = "%x", fields: Iterable[str] = ()) -> bytes:
    """A chunked POST whose sizes are written by ``size``."""
    framed = b"".join(size.encode() % len(piece) + b"\r\n" + piece + b"\r\n" for piece in pieces)
    return post("Transfer-Encoding: chunked", *fields, body=framed + end)


OK_LENGTH = f"Content-Length: {len(BODY)}"
