"""How mitmproxy's servers come to sockets that this process was given, and how they let go of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from mitmproxy import ctx

from proxy_addon.sockets import BACKLOG, Sockets

log = logging.getLogger("sollol")

ProtocolFactory = Callable[[], asyncio.BaseProtocol]

AT_ONCE = 64  #: connections that are accepted before others have their turn
REST_S = 1.0  #: between two tries to accept where the machine refuses, as asyncio has it


class Listening:
    """Lets ``loop.create_server(factory, host, port)`` serve ``sockets`` where they have that spot.

    ``held``: nothing is accepted before :meth:`serve`, for another process still does.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sockets: Sockets, held: bool = False) -> None:
        self._sockets = sockets
        self._held = held
        self._loop = loop
        self._create_server = loop.create_server
        self._waiting: list[Served] = []
        self._accepting: set[asyncio.Task[Any]] = set()
        loop.create_server = self.create_server  # type: ignore[method-assign, assignment]

    async def create_server(
        self, factory: ProtocolFactory, host: Any = None, port: int | None = None, **how: Any
    ) -> Any:
        """As the loop's own, which other servers get."""
        given = self._sockets.get((host or "", port)) if port is not None else None
        if given is None:
            how.setdefault("backlog", BACKLOG)
            return await self._create_server(factory, host, port, **how)
        served = Served(self._loop, given, lambda taken: self._serve(factory, taken))
        if self._held:
            self._waiting.append(served)
        else:
            served.begin()
        return served

    def serve(self) -> None:
        """Accept from now on, should that have been held."""
        waiting, self._waiting = self._waiting, []
        for served in waiting:
            served.begin()

    async def stop(self) -> None:
        """Close the ports; return once everybody who had connected by then is with a protocol."""
        await ctx.master.addons.get("proxyserver").servers.update([])
        await asyncio.gather(*self._accepting)

    def _serve(self, factory: ProtocolFactory, taken: socket.socket) -> None:
        task = asyncio.ensure_future(self._loop.connect_accepted_socket(factory, taken))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)


class Served:
    """The servers of one spot, as one: what mitmproxy asks of an ``asyncio.Server``.

    It accepts by itself: a server of uvloop's takes one connection in each turn of the loop (libuv's pull
    request 3696), so that under load, when a turn takes 20 ms, the last of a hundred clients waits for 2 s.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sockets: Sequence[socket.socket],
        serve: Callable[[socket.socket], None],
    ) -> None:
        self.sockets = tuple(sockets)
        self._loop = loop
        self._serve = serve
        self._begun = False
        self._resting: dict[socket.socket, asyncio.TimerHandle] = {}

    def begin(self) -> None:
        """Accept."""
        self._begun = True
        for one in self.sockets:
            self._watch(one)

    def close(self) -> None:
        """Listen no more. Who has connected by now is served: a socket that is closed resets its queue."""
        for one in self.sockets:
            self._loop.remove_reader(one)
            if one in self._resting:
                self._resting.pop(one).cancel()
            if self._begun:
                with contextlib.suppress(OSError):  # nobody is left
                    while True:
                        self._take(one)
            one.close()

    def _watch(self, one: socket.socket) -> None:
        self._resting.pop(one, None)
        self._loop.add_reader(one, self._accept, one)

    def _accept(self, one: socket.socket) -> None:
        """Take those who wait, so many that those who are being served do not wait for it."""
        try:
            for _ in range(AT_ONCE):
                self._take(one)
        except (BlockingIOError, ConnectionAbortedError):
            return  # nobody is left, or one has gone meanwhile
        except OSError as error:
            # Mostly for want of file descriptors. Whoever waits would be found in every turn of the loop.
            log.error("No connection can be accepted for %g s: %s", REST_S, error)
            self._loop.remove_reader(one)
            self._resting[one] = self._loop.call_later(REST_S, self._watch, one)

    def _take(self, one: socket.socket) -> None:
        connection, _ = one.accept()
        connection.setblocking(False)
        self._serve(connection)
