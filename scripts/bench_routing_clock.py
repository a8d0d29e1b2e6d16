"""An event loop whose seconds are shorter, so that hours of a fleet pass in minutes, and `sollol` under it.

The nodes, the client and the proxy all measure with ``loop.time()``. On this loop a second of theirs takes
``1 / speed`` of a real one for all of them alike: loads, tokens, polls, limits, what is learned and what is
reported keep their proportions, and nobody's constants have to be changed.

    python scripts/bench_routing_clock.py SPEED proxy --listen …    (`sollol proxy …` on that clock)

What is not sped up is the computer: what costs a millisecond here counts ``speed`` milliseconds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context
from functools import partial
from typing import Any

import uvloop


class FastLoop(uvloop.Loop):
    """A loop on which ``speed`` seconds pass in one."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed

    def time(self) -> float:
        """Seconds of the faster clock."""
        return super().time() * self._speed

    def call_later[*Ts](
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call back after ``delay`` seconds of the faster clock."""
        return super().call_later(delay / self._speed, callback, *args, context=context)

    def call_at[*Ts](
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call back when the faster clock says ``when``."""
        return self.call_later(when - self.time(), callback, *args, context=context)


def run[T](main: Coroutine[Any, Any, T], speed: float) -> T:
    """Run a coroutine on a faster clock."""
    with asyncio.Runner(loop_factory=partial(FastLoop, speed)) as runner:
        return runner.run(main)


def sollol(speed: float, arguments: list[str]) -> None:
    """Be `sollol` with these arguments."""
    from proxy_addon.cli import main

    uvloop.new_event_loop = partial(FastLoop, speed)  # where the proxy's launcher takes its loop from
    sys.argv = ["sollol", *arguments]
    main()


if __name__ == "__main__":
    sollol(float(sys.argv[1]), sys.argv[2:])
