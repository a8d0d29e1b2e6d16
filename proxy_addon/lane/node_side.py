"""The node's side of a request: its connection, and what the client's doings mean for that."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy.connection import Client, Server
from mitmproxy.proxy.server_hooks import (
    ServerConnectedHook,
    ServerConnectErrorHook,
    ServerConnectHook,
    ServerConnectionHookData,
)

from proxy_addon.attempt import CONNECT_CANCELLED
from proxy_addon.lane.pool import Pool
from proxy_addon.lane.splice import Splice
from proxy_addon.lane.upstream import Upstream
from proxy_addon.lean_addons import LeanAddons


class NodeSide:
    """What an exchange has of a node: a connection, or none; what passes its answer on, while it does."""

    def __init__(self, addons: LeanAddons, pool: Pool, connect_limit_s: Callable[[], float]) -> None:
        self.upstream: Upstream | None = None
        self.splice: Splice | None = None
        self._addons = addons
        self._pool = pool
        self._connect_limit_s = connect_limit_s

    async def connect(self, client: Client, address: tuple[str, int], *, fresh: bool) -> str:
        """Have a connection to ``address`` for ``client``, a kept one unless ``fresh``.

        Returns why there is none, or "".
        """
        self.upstream = None if fresh else self._pool.take(address)
        if self.upstream is not None:
            return ""
        data = ServerConnectionHookData(client=client, server=Server(address=address))
        await self._addons.run(ServerConnectHook, data)
        error = data.server.error or ""
        if not error:
            try:
                self.upstream = await self._pool.connect(data.server, self._connect_limit_s())
            except TimeoutError:
                error = CONNECT_CANCELLED
            except OSError as failed:
                error = str(failed)
            else:
                await self._addons.run(ServerConnectedHook, data)
                return ""
        data.server.error = error
        await self._addons.run(ServerConnectErrorHook, data)
        return error

    @property
    def reused(self) -> bool:
        """Whether the connection has carried an earlier request."""
        return self.upstream is not None and self.upstream.used

    def drop(self) -> None:
        """Hang up on the node, should there be one."""
        upstream, self.upstream, self.splice = self.upstream, None, None
        if upstream is not None:
            upstream.abort()

    def release(self) -> None:
        """The answer is over: let the next request have the connection."""
        upstream, self.upstream, self.splice = self.upstream, None, None
        if upstream is not None:
            self._pool.give(upstream)

    def interrupt(self) -> None:
        """The client has left: whoever waits for the node waits no more."""
        if self.splice is not None:
            self.splice.interrupt()
        elif self.upstream is not None:
            self.upstream.interrupt()

    def hold(self, hold: bool) -> None:
        """Read the node no further, for the client does not keep up; or read it on."""
        if self.upstream is None:
            return
        if hold:
            self.upstream.pause()
        else:
            self.upstream.resume()

    def break_off(self) -> bool:
        """End the attempt under way as if the node had; whether there is one."""
        if self.upstream is None:
            return False
        self.upstream.transport.abort()
        return True
