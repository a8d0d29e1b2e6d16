"""An event loop whose clock jumps: when nothing is ready it is at once as late as the next timer wants it.

For code that waits on timers, futures and tasks alone. There is no I/O in it and no threads; hours pass in
milliseconds, and the same program always runs the same way.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class Deadlock(RuntimeError):
    """Everybody waits and no timer is set: in real time the program would hang."""


class _NoIo(selectors.SelectSelector):
    """Where a loop would sleep until something happens, the clock jumps instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let ``timeout`` pass."""
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is set")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop of virtual seconds, from 0 on."""

    def __init__(self) -> None:
        self._clock = _NoIo()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual time."""
        return self._clock.now_s


def run[T](main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` in virtual time and return its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
