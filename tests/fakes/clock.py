"""The one clock of the fakes: the loop's, so that a loop with virtual time (``tests/sim``) moves them too."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

#: The date at zero of the loop's clock, which asyncio takes from ``time.monotonic``.
_ZERO = datetime.now(UTC) - timedelta(seconds=time.monotonic())


def clock_s() -> float:
    """Return the running loop's time."""
    return asyncio.get_running_loop().time()


def clock_ns() -> int:
    """Return the running loop's time, in the unit of Ollama's durations."""
    return int(clock_s() * 1e9)


def date_at(loop_s: float) -> datetime:
    """Return the date at a time of the loop's clock."""
    return _ZERO + timedelta(seconds=loop_s)
