"""The process that reads large bodies for the proxy: JSON that takes seconds keeps nobody waiting in it.

A client decides what its body is: 20 MB of ``[],[],[],…`` take orjson a second and the measures of the prompt
nine more, with the interpreter's lock held all the while. Frames on both pipes are a length and a pickle; it
is only ever our own two ends that write them. What goes back is small, whatever came.
"""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from typing import Any, BinaryIO

from proxy_addon import prefix
from proxy_addon.ask import Ask, BadRequest, parse
from proxy_addon.endpoints import Handling, match

LENGTH = struct.Struct("!Q")
MEMORY_LIMIT_BYTES = 4 << 30  #: JSON of many small objects takes twenty times its length
NICENESS = 5  #: who serves clients comes first
SHOWN = 64  #: characters of a value that goes back

#: Path, the headers that are read, the client, and the bytes of the body that follow.
Order = tuple[str, dict[str, str], str, int]
#: What was understood, or status and sentence of the refusal.
Reply = Ask | tuple[int, str]

TOO_MUCH_MEMORY = (413, f"the request body takes more than {MEMORY_LIMIT_BYTES >> 30} GiB of memory to read")


def read(order: Order, content: bytes) -> Reply:
    """What the request wants, without its prompt."""
    path, headers, client, _ = order
    endpoint = match(path)
    assert endpoint is not None, path
    try:
        ask = parse(endpoint, path, headers, content, client)
    except BadRequest as bad:
        return bad.status, bad.message
    if endpoint.handling is Handling.ROUTE:
        ask.body = {name: _shown(ask.body[name]) for name in ("priority",) if name in ask.body}
    return ask


def _shown(value: Any) -> Any:
    """A value that is read later than the rest, or what a sentence about it would show."""
    return value if isinstance(value, int | float | None) else str(value)[:SHOWN]


def frame(message: object) -> bytes:
    """``message`` as bytes on a pipe."""
    packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(packed)) + packed


def _received(source: BinaryIO) -> Any:
    """The next frame's message, None at the end."""
    length = source.read(LENGTH.size)
    return pickle.loads(source.read(LENGTH.unpack(length)[0])) if length else None


def main() -> None:
    """Serve standard input until it ends. The first frame is the key of :mod:`prefix`."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    prefix.use_key(_received(source))
    order: Order
    while order := _received(source):
        try:
            reply: Reply = read(order, source.read(order[3]))
        except MemoryError:
            reply = TOO_MUCH_MEMORY
        sink.write(frame(reply))
        sink.flush()
        if reply is TOO_MUCH_MEMORY:
            return  # what is left of the memory may be in pieces
