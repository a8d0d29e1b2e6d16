"""Where the lane listens: it takes a client's connection, or hands it to mitmproxy's layers.

mitmproxy makes the servers, one per mode; that of a reverse mode is told, before it listens, to make our
protocol for a connection instead of its streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client, ConnectionState
from mitmproxy.proxy import mode_specs
from mitmproxy.proxy.mode_servers import ServerInstance

from proxy_addon.access import Refusal
from proxy_addon.clients import Clients
from proxy_addon.deadlines import Deadlines
from proxy_addon.lane.client import ClientConnection
from proxy_addon.lane.exchange import Exchange
from proxy_addon.lane.head import RequestHead
from proxy_addon.lane.pool import Pool
from proxy_addon.lean_addons import LeanAddons
from proxy_addon.settings import Settings


class Lane:
    """An addon of mitmproxy's: takes the clients of its reverse modes."""

    def __init__(
        self, addons: LeanAddons, server: Proxyserver, clients: Clients, settings: Callable[[], Settings]
    ) -> None:
        self._addons = addons
        self._clients = clients
        self._settings = settings
        self._server = server
        self._pool = Pool()
        self._fronts: list[Front] = []
        server.servers.changed.connect(self._take)

    async def _take(self) -> None:
        """Servers are about to be started, or were stopped."""
        for instance in self._server.servers:
            if isinstance(instance.mode, mode_specs.ReverseMode) and not instance.is_running:
                front = Front(instance, self._addons, self._pool, self._clients, self._settings)
                self._fronts.append(front)
                instance.listen = front.listen  # type: ignore[attr-defined]

    @property
    def connected(self) -> int:
        """How many clients there are."""
        return sum(front.connected for front in self._fronts)

    def drain(self, idle_s: float, on_closed: Callable[[], None]) -> None:
        """Every answer is its connection's last from now on; who brings nothing for ``idle_s`` is closed."""
        for front in self._fronts:
            front.drain(idle_s, on_closed)

    def done(self) -> None:
        """The proxy ends."""
        for front in self._fronts:
            front.close()
        self._pool.close()


class Front:
    """The clients of one listening port."""

    def __init__(
        self,
        instance: ServerInstance[Any],
        addons: LeanAddons,
        pool: Pool,
        clients: Clients,
        settings: Callable[[], Settings],
    ) -> None:
        self._instance = instance
        self._addons = addons
        self._pool = pool
        self._clients = clients
        self.busy, self.idle, self.is_idle = clients.busy, clients.idle, clients.is_idle
        self._settings = settings
        self._open: set[ClientConnection] = set()
        self.deadlines = Deadlines()
        self._on_closed: Callable[[], None] = lambda: None
        self._drain_idle_s: float | None = None
        self._connect_limit_s = lambda: settings().timeouts.connect_s

    @property
    def settings(self) -> Settings:
        """As they are now."""
        return self._settings()

    @property
    def connected(self) -> int:
        """How many clients there are."""
        return len(self._open)

    @property
    def draining(self) -> bool:
        """Whether no connection is kept any more."""
        return self._drain_idle_s is not None

    @property
    def idle_limit_s(self) -> float:
        """How long a connection may wait for a request."""
        keepalive_s = self.settings.timeouts.keepalive_s
        return keepalive_s if self._drain_idle_s is None else min(keepalive_s, self._drain_idle_s)

    def drain(self, idle_s: float, on_closed: Callable[[], None]) -> None:
        """See :meth:`Lane.drain`."""
        self._drain_idle_s, self._on_closed = idle_s, on_closed
        for connection in self._open:
            if self._clients.is_idle(connection):
                connection.wait_anew()

    async def listen(self, host: str, port: int) -> list[asyncio.Server]:
        """Open the port, as mitmproxy's own servers do."""
        loop = asyncio.get_running_loop()
        return [await loop.create_server(lambda: ClientConnection(self), host or None, port)]

    def close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self._open):
            connection.abort()

    # -- told by a connection -------------------------------------------------------------------------

    def client_of(self, transport: asyncio.Transport) -> Client:
        """mitmproxy's view of the client at the other end."""
        return Client(
            peername=transport.get_extra_info("peername"),
            sockname=transport.get_extra_info("sockname"),
            timestamp_start=time.time(),
            proxy_mode=self._instance.mode,
            state=ConnectionState.OPEN,
        )

    def opened(self, connection: ClientConnection) -> None:
        """One more."""
        self._open.add(connection)
        if not self._clients.enter(connection, connection.close):
            connection.refuse(Refusal(503, "all connections that guard.max_connections allows are in use"))

    def closed(self, connection: ClientConnection) -> None:
        """One less."""
        self._open.discard(connection)
        self._clients.leave(connection)
        self._on_closed()

    def exchange(self, connection: ClientConnection, head: RequestHead) -> Exchange:
        """What carries the request."""
        return Exchange(connection, head, self._addons, self._pool, self._connect_limit_s)

    def hand_over(self, connection: ClientConnection, data: bytes) -> None:
        """Give a connection to mitmproxy's layers, with ``data`` that it has brought."""
        self.closed(connection)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        ordinary = asyncio.StreamReaderProtocol(reader, self._instance.handle_stream, loop=loop)
        connection.transport.set_write_buffer_limits()
        connection.hand_to(ordinary)
        ordinary.connection_made(connection.transport)
        ordinary.data_received(data)
