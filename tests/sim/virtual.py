"""An event loop whose clock jumps: when nothing is ready it is at once as late as the next timer wants it.

For code that waits on timers, futures and tasks alone. There is no I/O in it and no threads; hours pass in
milliseconds, and the same program always runs the same way.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
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
    """A loop of virtual seconds, from 0 on. What is meant for a thread is done at once, in no time."""

    def __init__(self) -> None:
        self._clock = _NoIo()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the virtual time."""
        return self._clock.now_s

    def run_in_executor[*A, T](  # type: ignore[override]
        self, executor: object, func: Callable[[*A], T], *args: *A
    ) -> asyncio.Future[T]:
        """Call ``func`` here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as problem:  # noqa: BLE001 - whoever awaits it gets it
            future.set_exception(problem)
        return future


def run[T](main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` in virtual time and return its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
