"""What comes in on a connection: read on, paused, and no more than one large piece in a turn of the loop.

libuv reads a socket up to 32 times in a row while it is full, and uvloop 250 kB each time: 8 MB and 15 ms in
one turn, of which the requests of everybody else need three or four.
"""

from __future__ import annotations

import asyncio

LARGE_BYTES = 64 << 10  #: in one piece: more is waiting, or is about to


class Inflow(asyncio.Protocol):
    """A protocol that is read while it wants to be, and which rests after a piece of :data:`LARGE_BYTES`."""

    transport: asyncio.Transport
    _paused = False

    def pause(self) -> None:
        """Read no further."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def rest_until_next_turn(self) -> None:
        """So much has come that the others get their turn before more is read."""
        if not self._paused and not self.transport.is_closing():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._next_turn)

    def hand_to(self, protocol: asyncio.Protocol) -> None:
        """Let ``protocol`` have the connection from now on, and read it, whatever was paused here."""
        self._paused = False
        self.transport.set_protocol(protocol)
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _next_turn(self) -> None:
        transport = self.transport  # which may have been handed on, and paused by whoever has it now
        if not (self._paused or transport.is_closing()) and transport.get_protocol() is self:
            transport.resume_reading()
