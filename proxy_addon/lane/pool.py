"""Connections to nodes that wait for their next request, whichever client the last one was for."""

from __future__ import annotations

import asyncio

from mitmproxy.connection import Server

from proxy_addon.lane.upstream import Upstream

IDLE_MAX = 1024  #: kept per node: as many as a busy proxy has under way there
IDLE_S = 60.0  #: a connection that was not used for so long is closed

Address = tuple[str, int]


class Pool:
    """Keeps what is idle, the last used first."""

    def __init__(self) -> None:
        self._idle: dict[Address, list[tuple[Upstream, float]]] = {}
        self._all: set[Upstream] = set()
        self._timer: asyncio.TimerHandle | None = None

    def take(self, address: Address) -> Upstream | None:
        """The idle connection to ``address`` that was used last; None if there is none."""
        idle = self._idle.get(address)
        return idle.pop()[0] if idle else None

    async def connect(self, server: Server, limit_s: float) -> Upstream:
        """A new connection to the address of ``server``.

        Raises:
            OSError: it failed; TimeoutError, which is one, after ``limit_s``.
        """
        assert server.address is not None
        upstream = Upstream(server, self._gone)
        async with asyncio.timeout(limit_s):
            await asyncio.get_running_loop().create_connection(lambda: upstream, *server.address)
        self._all.add(upstream)
        return upstream

    def give(self, upstream: Upstream) -> None:
        """Keep ``upstream``, whose answer is over, for the next request; close it if it cannot be kept."""
        address = upstream.server.address
        assert address is not None
        idle = self._idle.setdefault(address, [])
        if not upstream.is_reusable() or len(idle) >= IDLE_MAX:
            upstream.abort()
            return
        loop = asyncio.get_running_loop()
        idle.append((upstream, loop.time()))
        if self._timer is None:
            self._timer = loop.call_later(IDLE_S, self._expire)

    def close(self) -> None:
        """Close every connection."""
        if self._timer is not None:
            self._timer.cancel()
        for upstream in list(self._all):
            upstream.abort()

    def _gone(self, upstream: Upstream) -> None:
        self._all.discard(upstream)
        address = upstream.server.address
        assert address is not None
        idle = [each for each in self._idle.get(address, ()) if each[0] is not upstream]
        if idle:
            self._idle[address] = idle
        else:
            self._idle.pop(address, None)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() - IDLE_S
        for upstream, since_s in [each for idle in self._idle.values() for each in idle]:
            if since_s <= due_s:
                upstream.abort()
        waiting = [since_s for idle in self._idle.values() for _, since_s in idle if since_s > due_s]
        self._timer = loop.call_at(min(waiting) + IDLE_S, self._expire) if waiting else None
