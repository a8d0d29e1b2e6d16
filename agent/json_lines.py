"""JSON objects, one a line, over a transport that may afterwards carry something else."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import orjson

LONGEST_LINE_BYTES = 65536

type Message = dict[str, Any]


class NoMessage(Exception):
    """What came is no message of this protocol; the text is one sentence."""


class JsonLines(asyncio.Protocol):
    """The protocol until :meth:`hand_over`. One task receives; anybody may send.

    Reading pauses while a whole line waits to be taken: who sends without end fills his own buffers.
    """

    def __init__(self) -> None:
        self.transport = cast(asyncio.Transport, None)
        self.error: Exception | None = None  #: what ended the connection; None for an orderly end
        self.ended = False
        self._lost = False
        self._buffer = bytearray()
        self._woken = asyncio.Event()
        self._sent = asyncio.Event()
        self._sent.set()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        if self.pending:  # start_tls lets bytes come before it returns the transport
            self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Keep what came until somebody takes it."""
        self._buffer += data
        if self.transport is not None and (b"\n" in data or len(self._buffer) > LONGEST_LINE_BYTES):
            self.transport.pause_reading()
        self._woken.set()

    def eof_received(self) -> None:
        """End: nobody says anything to one who has stopped listening."""
        self.ended = True
        self._woken.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.ended, self._lost, self.error = True, True, exc
        self._woken.set()
        self._sent.set()

    def pause_writing(self) -> None:
        """Let :meth:`drain` wait."""
        self._sent.clear()

    def resume_writing(self) -> None:
        """Let :meth:`drain` go on."""
        self._sent.set()

    # What the tasks call

    @property
    def pending(self) -> bool:
        """Whether a whole line waits to be taken."""
        return b"\n" in self._buffer

    def send(self, message: Message) -> None:
        """Send one message."""
        self.transport.write(orjson.dumps(message) + b"\n")

    async def drain(self) -> None:
        """Wait until the other side has taken most of what was sent."""
        await self._sent.wait()

    async def receive(self, timeout_s: float | None = None) -> Message | None:
        """Return the next message, None at the end. Raises NoMessage, and TimeoutError if there is none yet.

        What has arrived counts as in time, even if this process was not let run in the meantime.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not (self.pending or self.ended) and len(self._buffer) <= LONGEST_LINE_BYTES:
                    await self._more()
        except TimeoutError:
            if not self.pending:
                raise
        line, newline, rest = self._buffer.partition(b"\n")
        if len(line) > LONGEST_LINE_BYTES:
            raise NoMessage(f"a line is longer than {LONGEST_LINE_BYTES} bytes")
        if not newline:
            return None
        self._buffer = rest
        try:
            message = orjson.loads(line)
        except ValueError:
            raise NoMessage("a line is no JSON") from None
        if not isinstance(message, dict):
            raise NoMessage("a line is no JSON object")
        return message

    async def discard(self, count: int) -> bool:
        """Take ``count`` raw bytes and forget them; False if the connection ends before."""
        while not self.ended:
            taken = min(count, len(self._buffer))
            del self._buffer[:taken]
            count -= taken
            if not count:
                return True
            await self._more()
        return False

    def hand_over(self, protocol: asyncio.Protocol) -> None:
        """Let ``protocol`` have the connection from now on, and what has arrived of its bytes."""
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        if self._buffer:
            protocol.data_received(bytes(self._buffer))
            self._buffer.clear()
        if self._lost:
            protocol.connection_lost(self.error)
        elif self.ended:
            self.transport.abort()
        else:
            self.transport.resume_reading()

    async def _more(self) -> None:
        self._woken.clear()
        self.transport.resume_reading()
        await self._woken.wait()
