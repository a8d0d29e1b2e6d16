"""An orderly end that loses nothing: the ports close, what has come is served, connections end one by one.

SIGTERM (and the first SIGINT) begins it; a second signal ends at once. Until the limit everything is served
that comes on connections which were open already, also who waits in line: a client that reuses one cannot
know. Each answer says ``connection: close``; a connection that brings nothing more is closed. What is left at
the limit is told so in its own protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from mitmproxy import http
from mitmproxy.connection import Client

from proxy_addon import errors, record, wire

log = logging.getLogger("sollol")

TEXT = "SOLLOL is shutting down"
TELL_S = 2.0  #: for the last words to those who are cut off
#: A kept connection that is closed while its next request is on the way loses that request. So a client that
#: is in the middle of something is given this long to come back, and is then told to close by the answer.
IDLE_S = 1.0
#: Where another process has taken over, nobody waits for this one's end: then it can be more than enough.
SUCCEEDED_IDLE_S = 10.0


class Lane(Protocol):
    """Who holds the connections that mitmproxy does not see (``lane/front.py``)."""

    @property
    def connected(self) -> int:
        """How many there are."""

    def drain(self, idle_s: float, on_closed: Callable[[], None]) -> None:
        """Close each after its next answer, or once it is idle for so long."""


class Drain:
    """Knows the clients' connections and what is under way on each; ``cut`` ends whatever is left."""

    def __init__(self, cut: Callable[[str], None]) -> None:
        self.ending = False
        self._idle_s = IDLE_S
        self.lane: Lane | None = None
        self._late = False  #: the limit has passed: nothing is begun any more
        self._cut = cut
        self._open: dict[str, str] = {}  # id of the flow → id of the client
        self._busy: dict[str, int] = {}  # ids of clients with flows → how many
        self._clients: dict[str, Client] = {}  # of mitmproxy's layers
        self._gone = asyncio.Event()  #: set once nobody is connected

    def under_way(self) -> int:
        """How many requests have begun and not ended."""
        return len(self._open)

    def client_connected(self, client: Client) -> None:
        """A connection is open."""
        self._clients[client.id] = client
        self._close_when_idle(client.id)

    def client_disconnected(self, client: Client) -> None:
        """A connection is closed."""
        self.let_go_client(client)

    def let_go_client(self, client: Client) -> None:
        """It is not there any more."""
        self._clients.pop(client.id, None)
        self._see_who_is_left()

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A kept connection may still bring a request after the ports were closed."""
        rec = record.of(flow)
        if rec is None or flow.response is not None:
            return
        if self._late:
            flow.response = errors.response(
                rec.protocol, 503, TEXT, request_id=rec.id, headers={"retry-after": "2"}
            )
            return
        client_id = flow.client_conn.id
        self._open[flow.id] = client_id
        self._busy[client_id] = self._busy.get(client_id, 0) + 1

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The next request must come on a new connection, which another process takes."""
        if self.ending and flow.response is not None:
            flow.response.headers["connection"] = "close"

    def response(self, flow: http.HTTPFlow) -> None:
        """Answered."""
        self.let_go(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        """Broken off, on either side."""
        self.let_go(flow)

    def let_go(self, flow: http.HTTPFlow) -> None:
        """It is not under way any more."""
        client_id = self._open.pop(flow.id, None)
        if client_id is None:
            return
        self._busy[client_id] = left = self._busy[client_id] - 1
        if not left:
            del self._busy[client_id]
            self._close_when_idle(client_id)

    def _close_when_idle(self, client_id: str) -> None:
        if self.ending and client_id in self._clients:
            asyncio.get_running_loop().call_later(self._idle_s, self._close_idle, client_id)

    def _close_idle(self, client_id: str) -> None:
        if client_id in self._clients and client_id not in self._busy:
            wire.close(self._clients[client_id])

    def _see_who_is_left(self) -> None:
        if not self._clients and (self.lane is None or not self.lane.connected):
            self._gone.set()

    async def wait(
        self, limit_s: float, close_ports: Callable[[], Awaitable[None]], succeeded: bool = False
    ) -> None:
        """Close the ports and return when the last client has left, at the latest after ``limit_s``.

        ``succeeded``: another process serves the ports by now.
        """
        self.ending = True
        self._idle_s = SUCCEEDED_IDLE_S if succeeded else IDLE_S
        await close_ports()
        for client_id in self._clients:
            self._close_when_idle(client_id)
        if self.lane is not None:
            self.lane.drain(self._idle_s, self._see_who_is_left)
        self._see_who_is_left()
        if self._open:
            log.info("Shutting down: %d answers in progress have up to %g s.", len(self._open), limit_s)
        try:
            async with asyncio.timeout(limit_s):
                await self._gone.wait()
        except TimeoutError:
            self._late = True
            log.warning("Shutting down with %d answers cut off after %g s.", len(self._open), limit_s)
            self._cut(TEXT)
            for client_id in list(self._clients):
                self._close_idle(client_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._gone.wait()
