"""Hostile clients that are told by what they do: slow, silent, greedy, gone; each a coroutine on one socket.

All of them end by themselves; what the proxy must do about each stands in ``test_behaviours.py``.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.hostile.forms import BODY, head, post, sized
from tests.hostile.wire import BOUND_S, Conversation

TRICKLE_S = 0.05  #: between two bytes of a slow client


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is reset in the end."""
    async with asyncio.timeout(BOUND_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def to_its_end(reader: asyncio.StreamReader, said: Conversation | None = None) -> Conversation:
    """What comes until the proxy ends the connection."""
    said = said or Conversation(b"")
    try:
        while data := await reader.read(1 << 16):
            said.raw += data
    except ConnectionError:
        said.reset = True
    return said


async def _trickled(port: int, at_once: bytes, slowly: bytes) -> Conversation:
    """Send ``at_once``, then ``slowly`` byte by byte, again and again, until the proxy hangs up."""
    async with connected(port) as (reader, writer):
        said = Conversation(b"")
        ending = asyncio.create_task(to_its_end(reader, said))
        writer.write(at_once)
        with suppress(ConnectionError):
            while not ending.done():
                for byte in slowly:
                    writer.write(bytes([byte]))
                    await asyncio.wait([ending], timeout=TRICKLE_S)
                    if ending.done():
                        break
        return await ending


async def slow_head(port: int) -> Conversation:
    """A head that never ends, a byte at a time."""
    return await _trickled(port, b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n", b"X-Slow: a\r\n")


async def slow_odd_head(port: int) -> Conversation:
    """The same in a form that only a full parser knows."""
    return await _trickled(port, b"GET http://localhost/api/version HTTP/1.0\r\n", b"X-Slow: a\r\n")


async def simple_request(port: int) -> Conversation:
    """HTTP/0.9: a request without a head, after which nothing comes."""
    async with connected(port) as (reader, writer):
        writer.write(b"GET /api/version\r\n")
        return await to_its_end(reader)


async def half_a_body(port: int) -> Conversation:
    """A body that stops half-way, with its length announced."""
    async with connected(port) as (reader, writer):
        writer.write(sized(BODY)[:-10])
        return await to_its_end(reader)


async def half_a_chunked_body(port: int) -> Conversation:
    """A body that stops half-way, in a chunk."""
    async with connected(port) as (reader, writer):
        writer.write(post("Transfer-Encoding: chunked", body=b"%x\r\n" % len(BODY) + BODY[:-10]))
        return await to_its_end(reader)


async def body_never_sent(port: int) -> Conversation:
    """Half of a head's promise: no byte of the body comes."""
    async with connected(port) as (reader, writer):
        writer.write(head("POST /v1/messages HTTP/1.1", "Content-Length: 100"))
        return await to_its_end(reader)


async def silent(port: int) -> Conversation:
    """A connection on which nothing is ever sent."""
    async with connected(port) as (reader, _):
        return await to_its_end(reader)


async def silent_after_a_request(port: int) -> Conversation:
    """A kept connection that is not used again."""
    async with connected(port) as (reader, writer):
        writer.write(head("GET /api/version HTTP/1.1"))
        return await to_its_end(reader)


async def half_a_request_behind_a_whole_one(port: int) -> Conversation:
    """Pipelining that stops in the second head."""
    async with connected(port) as (reader, writer):
        writer.write(head("GET /api/version HTTP/1.1") + b"GET /api/version HTTP/1.1\r\nHost: loc")
        return await to_its_end(reader)


async def half_closed(port: int) -> Conversation:
    """A whole request, then the end of what the client has to say."""
    async with connected(port) as (reader, writer):
        writer.write(sized(BODY))
        writer.write_eof()
        return await to_its_end(reader)


async def half_closed_in_a_head(port: int) -> Conversation:
    """The end in the middle of a head."""
    async with connected(port) as (reader, writer):
        writer.write(b"GET /api/version HTTP/1.1\r\nHost")
        writer.write_eof()
        return await to_its_end(reader)


async def half_closed_in_a_body(port: int) -> Conversation:
    """The end in the middle of a body."""
    async with connected(port) as (reader, writer):
        writer.write(sized(BODY)[:-10])
        writer.write_eof()
        return await to_its_end(reader)


async def reset_in_a_body(port: int) -> Conversation:
    """A reset in the middle of a body."""
    async with connected(port) as (_, writer):
        writer.write(sized(BODY)[:-10])
        await writer.drain()
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Conversation(b"", reset=True)
