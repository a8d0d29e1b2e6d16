"""A client's connection: heads are cut out, bodies are read on request, the slow and the idle have limits.

One request is under way at a time; what comes behind it waits here, up to a limit, then the client is read no
further. Limits are timers that are set only where something is missing, never for a request that comes whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, cast

from mitmproxy.connection import Client, ConnectionState

from proxy_addon import errors
from proxy_addon.access import Refusal
from proxy_addon.lane.framing import Chunked, Follower, FramingError, Length
from proxy_addon.lane.head import END, answer_bytes, may_become_plain, read_request
from proxy_addon.lane.inflow import LARGE_BYTES, Inflow
from proxy_addon.lane.upstream import ClientLeft
from proxy_addon.strict_head import too_large

if TYPE_CHECKING:
    from proxy_addon.lane.exchange import Exchange
    from proxy_addon.lane.front import Front

READ_AHEAD_BYTES = 64 << 10  #: of requests behind the one under way
HIGH_WATER_BYTES = 64 << 10  #: of an answer in our own buffer; then its node is read no further
#: A body that nobody wants is read on, so that the client gets to see the answer instead of a reset, up to
#: here (nginx: ``lingering_close``).
DISCARD_LIMIT_BYTES = 256 << 20


class BadBody(Exception):
    """The request's body cannot be read on: ``refusal`` is the answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class ClientConnection(Inflow):
    """One client. ``front`` owns it."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.client: Client
        self.left = False  #: gone, or hung up on
        self.closing = False  #: nothing is read after the answer under way
        self._exchange: Exchange | None = None
        self._buffer = b""
        self._full = False  # the client does not take what it is sent
        self._drained: asyncio.Future[None] | None = None
        self._follower: Follower | None = None  # of the body under way, until it has ended
        self._take: Callable[[bytes], None] | None = None  # what reads it
        self._body: asyncio.Future[None] | None = None  # done at its end
        self._awaits_body = False  # and has a limit for its next piece

    # -- what the loop calls --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.client = self.front.client_of(self.transport)
        self.front.opened(self)
        self.wait_anew()

    def data_received(self, data: bytes) -> None:
        """A request, more of one, or the next one."""
        if len(data) >= LARGE_BYTES:
            self.rest_until_next_turn()
        if self._take is not None:
            self._fed(data)
            return
        self._buffer = self._buffer + data if self._buffer else data
        if self._exchange is None:
            self._next()
        elif len(self._buffer) > READ_AHEAD_BYTES:
            self.pause()

    def eof_received(self) -> None:
        """A client that ends its side counts as gone, as with nginx; the transport closes by itself."""
        return

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was hung up on."""
        self.left = True
        self.client.state = ConnectionState.CLOSED
        self._disarm()
        self.front.closed(self)
        for waiter in (self._body, self._drained):
            if waiter is not None and not waiter.done():
                waiter.set_exception(ClientLeft())
        if self._exchange is not None:
            self._exchange.client_left()

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        self._full = True
        if self._exchange is not None:
            self._exchange.node.hold(True)

    def resume_writing(self) -> None:
        """It does again."""
        self._full = False
        if self._exchange is not None:
            self._exchange.node.hold(False)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._exchange is None:
            self._soon()

    # -- requests -------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Begin the next request, if its head has come."""
        if self._exchange is not None or self.left or self._full or not self._buffer:
            return
        end = self._buffer.find(END)
        settings = self.front.settings
        if (end if end >= 0 else len(self._buffer)) > settings.guard.head_limit_bytes:
            self.refuse(too_large(settings.guard.head_limit_bytes))
            return
        if end < 0:
            self.resume()  # it may have been read ahead of an answer up to the middle of this head
            if not may_become_plain(self._buffer):
                self._hand_over()
            elif self.front.busy(self):
                self._arm(settings.timeouts.head_s, self._too_slow)
            return
        self._disarm()
        head = read_request(self._buffer[: end + 4])
        if head is None:
            self._hand_over()
            return
        self._buffer = self._buffer[end + 4 :]
        self.front.busy(self)
        self._follower = (
            None if head.length == 0 else Chunked() if head.length is None else Length(head.length)
        )
        self._exchange = self.front.exchange(self, head)
        self._exchange.start()

    def finished(self, *, keep: bool) -> None:
        """The request under way is over, and its body has been read if ``keep``."""
        self._exchange = None
        if not keep or self.closing or self._follower is not None:
            self.close()
            return
        if self.left:
            return
        self._idle()
        if self._buffer:
            self._soon()
        else:
            self.resume()

    def _soon(self) -> None:
        # Not at once: a thousand requests in one packet must neither nest nor keep the others waiting.
        asyncio.get_running_loop().call_soon(self._next)

    def _hand_over(self) -> None:
        """Let mitmproxy's layers have the connection, from this request on."""
        self._disarm()
        self.front.hand_over(self, self._buffer)

    def refuse(self, refusal: Refusal) -> None:
        """Answer what never became a request, and close."""
        answer = errors.refused("native", refusal)
        self.write(answer_bytes(answer, close=True) + (answer.raw_content or b""))
        self._buffer = b""
        self.close()

    # -- bodies ---------------------------------------------------------------------------------------

    async def body(self, grow: Callable[[int], Refusal | None] | None) -> bytes:
        """The whole body of the request under way. ``grow`` is asked before more of it is held.

        Raises:
            BadBody: it may not be held, is too slow, or its framing is broken.
            ClientLeft: the client has gone.
        """
        whole = BytesIO()  # gives its bytes away as they are: joining 100 MB would keep everybody waiting

        def collect(data: bytes) -> None:
            if grow is not None and (refusal := grow(len(data))) is not None:
                whole.close()
                raise BadBody(refusal)
            whole.write(data)

        await self.read(collect)
        return whole.getvalue()

    async def read(self, take: Callable[[bytes], None]) -> None:
        """Give the body of the request under way to ``take`` as it comes, to its end.

        Raises:
            BadBody: it is too slow, its framing is broken, or ``take`` raised it.
            ClientLeft: the client has gone.
        """
        if self._follower is None:
            return
        self._body = asyncio.get_running_loop().create_future()
        self._take = take
        if self._buffer:
            data, self._buffer = self._buffer, b""
            self._fed(data)
        try:
            if not self._body.done():
                if self.left:
                    raise ClientLeft
                self._arm(self.front.settings.timeouts.body_s, self._body_too_slow)
                self._awaits_body = True
                self.resume()
            await self._body
        finally:
            self._take = self._body = None
            self._awaits_body = False

    async def discard(self) -> bool:
        """Read the rest of the body away; whether it has ended, so that the connection can be kept."""
        left = DISCARD_LIMIT_BYTES

        def drop(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise BadBody(Refusal(413, "the request body is too large to be read away"))

        try:
            await self.read(drop)
        except (BadBody, ClientLeft):
            return False
        return True

    def _fed(self, data: bytes) -> None:
        """Some of the body has come."""
        follower, take, body = self._follower, self._take, self._body
        assert follower is not None and take is not None and body is not None
        if body.done():
            self._buffer += data
            return
        try:
            payload = follower.feed(data)
            if payload:
                take(payload)
        except FramingError as error:
            self.closing = True  # nobody knows where the next request would begin
            body.set_exception(BadBody(Refusal(400, f"the request body is broken: {error}")))
        except BadBody as error:
            self._take = None
            body.set_exception(error)
        else:
            if follower.ended:
                self._follower, self._take, self._buffer = None, None, follower.rest
                if self._awaits_body:
                    self._disarm()
                body.set_result(None)
            elif self._awaits_body:
                self._arm(self.front.settings.timeouts.body_s, self._body_too_slow)

    # -- answers --------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send ``data``, if the client is still there."""
        if not self.left:
            self.transport.write(data)

    async def drained(self) -> None:
        """Wait until the client takes more. Raises ClientLeft if it goes."""
        if self.left:
            raise ClientLeft
        if self._full:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    @property
    def is_sending(self) -> bool:
        """Whether some of the body of the request under way is still to be read."""
        return self._follower is not None

    @property
    def is_full(self) -> bool:
        """Whether the client does not take what it is sent."""
        return self._full

    def close(self) -> None:
        """Close once everything has been sent."""
        self._disarm()
        self.transport.close()

    def abort(self) -> None:
        """Hang up at once."""
        self.transport.abort()

    # -- limits ---------------------------------------------------------------------------------------

    def _idle(self) -> None:
        self.front.idle(self)
        self.wait_anew()

    def wait_anew(self) -> None:
        """From now on it may be idle for as long as the front allows now."""
        self._arm(self.front.idle_limit_s, self._idle_too_long)

    def _idle_too_long(self) -> None:
        # What has come meanwhile is read before the loop's next turn: a request that was sent in time, while
        # the loop was late, must not meet a closed connection.
        asyncio.get_running_loop().call_soon(self._close_if_idle)

    def _close_if_idle(self) -> None:
        answered_meanwhile = self in self.front.deadlines  # and idle anew
        if not self.left and self.front.is_idle(self) and not answered_meanwhile:
            self.close()

    def _arm(self, delay_s: float, due: Callable[[], None]) -> None:
        self.front.deadlines.set(self, delay_s, due)

    def _disarm(self) -> None:
        self.front.deadlines.clear(self)

    def _too_slow(self) -> None:
        limit_s = self.front.settings.timeouts.head_s
        self.refuse(Refusal(408, f"no whole request within {limit_s:g} s"))

    def _body_too_slow(self) -> None:
        self.closing = True
        if self._body is not None and not self._body.done():
            limit_s = self.front.settings.timeouts.body_s
            slow = Refusal(408, f"no more of the request body came within {limit_s:g} s")
            self._body.set_exception(BadBody(slow))
