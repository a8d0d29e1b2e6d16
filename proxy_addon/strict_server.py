"""mitmproxy's HTTP/1 server made strict and impatient: for the connections that its layers still serve.

Heads are read by :mod:`strict_head` before mitmproxy's parser sees them, broken bodies get an answer, and
whoever is slow with a head or a body, or keeps a connection without a use, is closed. (mitmproxy has no limit
for any of these.)
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, ClassVar, Literal

from mitmproxy import http
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layers.http import ReceiveHttp
from mitmproxy.proxy.layers.http._events import ErrorCode, RequestProtocolError
from mitmproxy.proxy.layers.http._http1 import Http1Server

from proxy_addon import errors, strict_head
from proxy_addon.access import Refusal
from proxy_addon.clients import Clients
from proxy_addon.endpoints import protocol_of
from proxy_addon.settings import Settings

Commands = Generator[commands.Command, Any, None]
Phase = Literal["idle", "head", "body", "next"]

#: Of what a client sends behind a request that is not answered yet. These layers cannot stop reading a client
#: for a while, so it is hung up on.
READ_AHEAD_BYTES = 1 << 20
BROKEN_BODY = Refusal(400, "the request's body is not framed as its head says")


class StrictServer(Http1Server):
    """One client's connection."""

    settings: ClassVar[Settings]  #: as they are now; set by ``layers.py``
    clients: ClassVar[Clients]  #: which are told whose connection is idle; set there as well
    _phase: Phase | None = None  # what the client is waited for, None while it waits for us
    _since_s = 0.0
    _wakeups: dict[commands.RequestWakeup, Phase]

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._wakeups = {}

    def _handle_event(self, event: events.Event) -> Commands:
        if isinstance(event, events.Wakeup):
            yield from self._woken(self._wakeups.pop(event.command))
            return
        yield from super()._handle_event(event)
        if self.state == self.wait and len(self.buf) > READ_AHEAD_BYTES:
            yield from self._hang_up()
        phase = self._waited_for()
        if phase != self._phase or (phase == "body" and isinstance(event, events.DataReceived)):
            self._phase, self._since_s = phase, time.monotonic()
            if phase == "idle":
                self.clients.idle(self.context.client)
            else:
                self.clients.busy(self.context.client)
            if phase is not None and phase not in self._wakeups.values():
                yield self._wakeup(phase, self._limit_s(phase))

    # -- what is read ---------------------------------------------------------------------------------

    def read_headers(self, event: events.ConnectionEvent) -> Commands:
        """As the parent, for heads that every server reads alike."""
        if isinstance(event, events.DataReceived) and not event.data:
            # The next request has come with the one before. At once, a thousand of them would nest.
            yield self._wakeup("next", 0)
            return
        if isinstance(event, events.DataReceived):
            while bytes(self.buf)[:2] == b"\r\n":  # RFC 9112 §2.2; the parent would wait for more
                self.buf.maybe_extract_at_most(2)
            refusal = self._judge(bytes(self.buf))
            if refusal is not None:
                yield from self._refuse(refusal)
                return
        yield from super().read_headers(event)

    def _judge(self, begun: bytes) -> Refusal | None:
        limit_bytes, end = self.settings.guard.head_limit_bytes, strict_head.end_of(begun)
        if max(end, 0) > limit_bytes or (end < 0 and len(begun) > limit_bytes):
            return strict_head.too_large(limit_bytes)
        return strict_head.refusal(begun[:end]) if end >= 0 else None

    def read_body(self, event: events.Event) -> Commands:
        """As the parent, but a client whose framing is broken is told before it is hung up on."""
        for command in super().read_body(event):
            broken = isinstance(command, commands.CloseConnection) and not self.request_done
            if broken and isinstance(event, events.DataReceived) and self.response is None:
                yield commands.SendData(self.conn, self._error(BROKEN_BODY))
            yield command
            if broken:
                self.state = self.done

    # -- who is slow ----------------------------------------------------------------------------------

    def _waited_for(self) -> Phase | None:
        if self.state == self.read_headers:
            return "head" if self.buf else "idle"
        return "body" if self.state == self.read_body else None

    def _limit_s(self, phase: Phase) -> float:
        limits = self.settings.timeouts
        return {"idle": limits.keepalive_s, "head": limits.head_s, "body": limits.body_s}[phase]

    def _taken(self) -> bytes:
        """What waits to be read, to be received once more."""
        return bytes(self.buf.maybe_extract_at_most(len(self.buf)) or b"")

    def _wakeup(self, phase: Phase, delay_s: float) -> commands.RequestWakeup:
        # One that outlives its phase is found too early then, and asks again: a timer per connection, not
        # one per request.
        command = commands.RequestWakeup(delay_s)
        self._wakeups[command] = phase
        return command

    def _woken(self, phase: Phase) -> Commands:
        if phase == "next":
            if self.state == self.read_headers and self.buf:
                yield from self._handle_event(events.DataReceived(self.conn, self._taken()))
            return
        if phase != self._phase:
            return
        limit_s = self._limit_s(phase)
        left_s = self._since_s + limit_s - time.monotonic()
        if left_s > 0:
            yield self._wakeup(phase, left_s)
        elif phase == "idle" or self.response is not None:
            yield from self._hang_up()
        else:
            what = "no whole request came" if phase == "head" else "no more of the request's body came"
            yield from self._refuse(Refusal(408, f"{what} within {limit_s:g} s"))

    # -- the end --------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> Commands:
        yield commands.SendData(self.conn, self._error(refusal))
        yield from self._hang_up()

    def _hang_up(self) -> Commands:
        busy, self.state, self._phase = self.state in (self.read_body, self.wait), self.done, None
        yield commands.CloseConnection(self.conn)
        if busy:
            left = RequestProtocolError(self.stream_id, "client disconnected", ErrorCode.CLIENT_DISCONNECTED)
            yield ReceiveHttp(left)

    def _error(self, refusal: Refusal) -> bytes:
        protocol = protocol_of(self.request.path) if self.request is not None else "native"
        answer: http.Response = errors.response(
            protocol, refusal.status, refusal.message, headers={"connection": "close"}
        )
        return bytes(http1.assemble_response(answer))
