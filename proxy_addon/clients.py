"""Who is connected to the proxy, by lane or by layers: one limit for all, and who makes room beyond it."""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Clients:
    """The connections of clients, and those without a request in the order in which they became so.

    ``most()`` is how many there may be. A connection is known by any object of its own.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._close: dict[Hashable, Callable[[], None]] = {}
        self._idle: dict[Hashable, None] = {}

    def enter(self, connection: Hashable, close: Callable[[], None]) -> bool:
        """One more, without a request. Beyond the limit whoever has been idle for longest is closed.

        Returns whether it may stay: not where all that there may be are in use.
        """
        room = len(self._close) < self._most() or self._make_room()
        self._close[connection] = close
        if room:
            self._idle[connection] = None
        return room

    def _make_room(self) -> bool:
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]  # the next one must not count on the same room
        self._close[oldest]()
        return True

    def idle(self, connection: Hashable) -> None:
        """It waits for a request; of one that has left that may come late."""
        if connection in self._close:
            self._idle[connection] = None

    def is_idle(self, connection: Hashable) -> bool:
        """Whether it waits for a request."""
        return connection in self._idle

    def busy(self, connection: Hashable) -> bool:
        """It has begun a request; whether that is news."""
        return self._idle.pop(connection, self) is None

    def leave(self, connection: Hashable) -> None:
        """It has gone."""
        self._close.pop(connection, None)
        self._idle.pop(connection, None)
