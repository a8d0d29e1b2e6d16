"""Two connections that carry each other's bytes.

Every token of a sharded model passes here several times, so nothing is awaited: a protocol writes what it
receives to the other side's transport. Back-pressure is the transports' own: when one side's buffer is full,
the other side is not read. asyncio sets TCP_NODELAY on every TCP connection.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast


class Splice(asyncio.Protocol):
    """One side. The end of either is the end of both, after what was received has been sent."""

    def __init__(
        self,
        *,
        received: Callable[[int], None] | None = None,
        ended: Callable[[Splice], None] | None = None,
    ) -> None:
        self.transport = cast(asyncio.Transport, None)
        self._other: Splice | None = None
        self._write: Callable[[bytes], None] = self._keep
        self._kept = b""
        self._received = received
        self._ended = ended

    def join(self, other: Splice) -> None:
        """Let the two carry each other's bytes from now on."""
        for one, another in ((self, other), (other, self)):
            one._other, one._write = another, another.transport.write
            if one._kept:
                another.transport.write(one._kept)
                one._kept = b""

    def reset(self) -> None:
        """End both sides with a RST, so that whoever waits on them fails at once."""
        other, self._other = self._other, None
        reset(self.transport)
        if other is not None:
            other._other = None
            reset(other.transport)

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Carry."""
        if self._received is not None:
            self._received(len(data))
        self._write(data)

    def pause_writing(self) -> None:
        """Do not read what could not be written here."""
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on."""
        if self._other is not None:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side as this one ended."""
        other, self._other = self._other, None
        self._write = _nowhere
        if other is not None:
            other._other = None
            if exc is None:
                other.transport.close()
            else:
                reset(other.transport)
        if self._ended is not None:
            self._ended(self)

    def _keep(self, data: bytes) -> None:
        self._kept += data


def reset(transport: asyncio.Transport) -> None:
    """End a connection with a RST, dropping what was not sent yet."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _nowhere(data: bytes) -> None:
    pass
