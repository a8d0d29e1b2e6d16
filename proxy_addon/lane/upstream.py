"""A connection to a node: sends one request at a time, reads its answer, then waits for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from mitmproxy.connection import ConnectionState, Server

from proxy_addon.lane.framing import Follower, FramingError
from proxy_addon.lane.head import END, AnswerHead, read_answer
from proxy_addon.lane.inflow import LARGE_BYTES, Inflow

LONGEST_HEAD = 256 << 10  #: of an answer
READ_AHEAD_BYTES = 256 << 10  #: of an answer that is not taken yet; then the node is read no further
HIGH_WATER_BYTES = 64 << 10  #: of an upload in our own buffer; then its client is read no further


class Lost(Exception):
    """The node's answer has broken off, or is none; the sentence says how."""


class ClientLeft(Exception):
    """The client has gone: nobody wants the answer any more."""


class Sink(Protocol):
    """Takes an answer's body as it comes."""

    def data(self, data: bytes) -> None:
        """Some bytes, as they stood on the wire."""

    def lost(self, reason: str, clean: bool) -> None:
        """The connection has ended; ``clean``: the node said so."""


class Upstream(Inflow):
    """One connection. ``on_gone`` is told when it has ended, whoever ended it."""

    def __init__(self, server: Server, on_gone: Callable[[Upstream], None]) -> None:
        self.server = server
        self.used = False  #: has carried an earlier request
        self.sink: Sink | None = None
        self.on_writable: Callable[[bool], None] | None = None
        self._asked = False  # a request is under way
        self._follower: Follower | None = None  # of the body under way
        self._may_stay = False  # the answer under way leaves the connection usable
        self._gone: str | None = None  # why it is no more
        self._clean = False  # the node has ended its side in order
        self._buffer = b""
        self._unwanted = False  # the client has left
        self._waiter: asyncio.Future[None] | None = None
        self._on_gone = on_gone

    # -- what the loop calls --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.server.peername = transport.get_extra_info("peername")
        self.server.sockname = transport.get_extra_info("sockname")
        self.server.state = ConnectionState.OPEN

    def data_received(self, data: bytes) -> None:
        """Some of an answer."""
        if len(data) >= LARGE_BYTES:
            self.rest_until_next_turn()
        if self.sink is not None:
            self.sink.data(data)
        elif not self._asked:
            self.transport.abort()  # who speaks out of turn cannot be trusted with what follows
        else:
            self._buffer = self._buffer + data if self._buffer else data
            if len(self._buffer) > READ_AHEAD_BYTES:
                self.pause()
            self._wake()

    def eof_received(self) -> None:
        """The node has ended its side; the transport closes by itself."""
        self._clean = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Ended, by either side."""
        self.server.state = ConnectionState.CLOSED
        self._gone = "the node closed the connection" if exc is None else f"the connection broke: {exc}"
        if self.sink is not None:
            self.sink.lost(self._gone, self._clean)
        self._on_gone(self)
        self._wake()

    def pause_writing(self) -> None:
        """The node does not take what it is sent."""
        if self.on_writable is not None:
            self.on_writable(False)

    def resume_writing(self) -> None:
        """It does again."""
        if self.on_writable is not None:
            self.on_writable(True)

    # -- what an exchange calls -----------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send a request, or more of it."""
        self._asked = True
        if self._gone is None:
            self.transport.write(data)

    async def head(self, method: str) -> AnswerHead:
        """The head of the answer to a request of ``method``; interim ones (1xx) are passed over.

        Raises:
            Lost: there is none.
            ClientLeft: :meth:`interrupt` was called meanwhile.
        """
        while True:
            end = self._buffer.find(END)
            if end >= 0:
                head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
                try:
                    answer = read_answer(head, method)
                except ValueError as error:
                    raise Lost(f"the answer is no HTTP: {error}") from error
                if answer.response.status_code >= 200:
                    self._follower, self._may_stay = answer.follower, answer.keep_alive
                    return answer
                if answer.response.status_code == 101:
                    raise Lost("the node changed the protocol unasked")
            elif len(self._buffer) > LONGEST_HEAD or (
                self._buffer and not b"HTTP/1.".startswith(self._buffer[:7])
            ):
                raise Lost("the answer is no HTTP")
            else:
                await self._more()

    @property
    def ended(self) -> bool:
        """The answer is complete."""
        return self._follower is not None and self._follower.ended

    async def payload(self) -> bytes:
        """What has come of the answer's body since; waits until something has. Empty only at its end.

        Raises:
            Lost: it broke off, or its framing is broken.
            ClientLeft: :meth:`interrupt` was called meanwhile.
        """
        follower = self._follower
        assert follower is not None
        while not follower.ended:
            data, self._buffer = self._buffer, b""
            self.resume()
            if data and (payload := self._fed(follower, data)):
                return payload
            if not (data or follower.ended):
                await self._more()
        return b""

    def relay(self, sink: Sink) -> bytes:
        """From now on give the body to ``sink``; what has come of it already is returned."""
        data, self._buffer = self._buffer, b""
        self.sink = sink
        return data

    @property
    def follower(self) -> Follower:
        """That of the answer under way."""
        assert self._follower is not None
        return self._follower

    def is_reusable(self) -> bool:
        """Whether the answer has ended so that the connection can carry another request; readies it."""
        follower = self._follower
        stays = (
            follower is not None
            and follower.ended
            and not (follower.rest or self._buffer)
            and self._may_stay
            and self._gone is None
            and not self.transport.is_closing()
        )
        self.used, self._asked, self._follower, self.sink, self.on_writable = True, False, None, None, None
        self.resume()  # its client may not have taken all of that answer yet, but others will ask
        return stays

    def abort(self) -> None:
        """End the connection at once."""
        self.sink = None
        self.transport.abort()

    def interrupt(self) -> None:
        """Raise ClientLeft in whoever waits here, now or next."""
        self._unwanted = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ClientLeft())

    # -- within ---------------------------------------------------------------------------------------

    def _fed(self, follower: Follower, data: bytes) -> bytes:
        try:
            return follower.feed(data)
        except FramingError as error:
            raise Lost(f"the answer's framing is broken: {error}") from error

    async def _more(self) -> None:
        """Wait until something has come. Raises Lost where nothing will, ClientLeft where nobody wants it."""
        if self._unwanted:
            raise ClientLeft
        if self._gone is not None:
            if self._clean and self._follower is not None:
                try:
                    self._follower.end()
                except FramingError as error:
                    raise Lost(str(error)) from error
                return
            raise Lost(self._gone)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
