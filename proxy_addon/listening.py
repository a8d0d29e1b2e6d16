"""How mitmproxy's servers come to sockets that this process was given, and how they let go of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from mitmproxy import ctx

from proxy_addon.sockets import BACKLOG, Sockets

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


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
        how.setdefault("backlog", BACKLOG)
        given = self._sockets.get((host or "", port)) if port is not None else None
        if given is None:
            return await self._create_server(factory, host, port, **how)

        async def begin(one: socket.socket) -> asyncio.Server:
            return await self._create_server(factory, sock=one, **how)

        served = Served(given, begin, lambda taken: self._serve(factory, taken))
        if self._held:
            self._waiting.append(served)
        else:
            await served.begin()
        return served

    async def serve(self) -> None:
        """Accept from now on, should that have been held."""
        waiting, self._waiting = self._waiting, []
        for served in waiting:
            await served.begin()

    async def stop(self) -> None:
        """Close the ports; return once everybody who had connected by then is with a protocol."""
        await ctx.master.addons.get("proxyserver").servers.update([])
        await asyncio.gather(*self._accepting)

    def _serve(self, factory: ProtocolFactory, taken: socket.socket) -> None:
        task = asyncio.ensure_future(self._loop.connect_accepted_socket(factory, taken))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)


class Served:
    """The servers of one spot, as one: what mitmproxy asks of an ``asyncio.Server``."""

    def __init__(
        self,
        given: list[socket.socket],
        begin: Callable[[socket.socket], Any],
        serve: Callable[[socket.socket], None],
    ) -> None:
        self.sockets = tuple(given)
        self._begin = begin
        self._serve = serve
        self._servers: list[asyncio.Server] = []

    async def begin(self) -> None:
        """Accept. A duplicate serves, since a server closes its own: ours can still be passed on."""
        for one in self.sockets:
            self._servers.append(await self._begin(one.dup()))

    def close(self) -> None:
        """Listen no more. Who has connected by now is served: a socket that is closed resets its queue."""
        for one in self.sockets:
            if self._servers:
                with contextlib.suppress(OSError):  # nobody is left
                    while True:
                        self._serve(_unblocked(one.accept()[0]))
            one.close()
        for server in self._servers:
            server.close()


def _unblocked(connection: socket.socket) -> socket.socket:
    connection.setblocking(False)
    return connection
