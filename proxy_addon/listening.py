"""How mitmproxy's servers come to sockets that this process was given, and how they let go of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Any

from mitmproxy import ctx

from proxy_addon.sockets import BACKLOG, Sockets

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class Listening:
    """Lets ``loop.create_server(factory, host, port)`` serve :attr:`sockets` where they have that spot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sockets: Sockets) -> None:
        self.sockets = sockets
        self._loop = loop
        self._create_server = loop.create_server
        self._accepting: set[asyncio.Task[Any]] = set()
        loop.create_server = self.create_server  # type: ignore[method-assign, assignment]

    async def create_server(
        self, factory: ProtocolFactory, host: Any = None, port: int | None = None, **how: Any
    ) -> Any:
        """As the loop's own, which other servers get."""
        given = self.sockets.get((host or "", port)) if port is not None else None
        how.setdefault("backlog", BACKLOG)
        if given is None:
            return await self._create_server(factory, host, port, **how)
        # A duplicate, since the server closes its own: ours can still be passed on.
        servers = [await self._create_server(factory, sock=one.dup(), **how) for one in given]
        return Served(servers, given, lambda taken: self._serve(factory, taken))

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
        servers: Iterable[asyncio.Server],
        given: list[socket.socket],
        serve: Callable[[socket.socket], None],
    ) -> None:
        self._servers = list(servers)
        self._given = given
        self._serve = serve

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Those that listen."""
        return tuple(one for server in self._servers for one in server.sockets)

    def close(self) -> None:
        """Listen no more. Who has connected by now is served: a socket that is closed resets its queue."""
        for one in self._given:
            with contextlib.suppress(OSError):
                while True:
                    self._serve(_unblocked(one.accept()[0]))
            one.close()
        for server in self._servers:
            server.close()


def _unblocked(connection: socket.socket) -> socket.socket:
    connection.setblocking(False)
    return connection
