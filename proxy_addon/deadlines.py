"""Many time limits, of which few are ever reached, on one timer of the loop.

A timer of the loop costs some 6 µs to set and to cancel, which a request would pay for each of its phases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush

SPARE = 64  #: cleared limits that may lie in the heap besides as many as are set


class Deadlines:
    """Limits by key, one each; to be used within a running loop, whose clock they go by."""

    def __init__(self) -> None:
        self._set: dict[Hashable, tuple[int, Callable[[], object]]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._number = 0  # tells a limit from earlier ones of its key, and equals in the heap
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def set(self, key: Hashable, delay_s: float, due: Callable[[], object]) -> None:
        """Call ``due`` in ``delay_s``, in place of what was set for ``key``, unless it is cleared before."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + delay_s
        self._number += 1
        self._set[key] = (self._number, due)
        heappush(self._heap, (at_s, self._number, key))
        if self._timer is None or at_s < self._timer_s:
            self._wake_at(loop, at_s)

    def clear(self, key: Hashable) -> None:
        """Nothing is due for ``key`` any more."""
        self._set.pop(key, None)
        if len(self._heap) > 2 * len(self._set) + SPARE:
            self._heap = [entry for entry in self._heap if self._stands(entry)]
            heapify(self._heap)

    def __contains__(self, key: Hashable) -> bool:
        """Whether something is due for ``key``."""
        return key in self._set

    def _stands(self, entry: tuple[float, int, Hashable]) -> bool:
        found = self._set.get(entry[2])
        return found is not None and found[0] == entry[1]

    def _wake_at(self, loop: asyncio.AbstractEventLoop, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = loop.call_at(at_s, self._due), at_s

    def _due(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = max(loop.time(), self._timer_s)  # uvloop's clock counts whole milliseconds
        self._timer = None
        while self._heap and (self._heap[0][0] <= now_s or not self._stands(self._heap[0])):
            entry = heappop(self._heap)
            if self._stands(entry):
                loop.call_soon(self._set.pop(entry[2])[1])  # so that one that fails stops no other
        if self._heap:
            self._wake_at(loop, self._heap[0][0])
