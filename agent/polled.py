"""One part of a report that is read again and again, and that may fail without harming the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import psutil

from agent.ollama.client import OllamaError, OllamaUnreachable

logger = logging.getLogger(__name__)

# What reading a part may end with in the ordinary course of things: said in the report, not worth a trace.
EXPECTED = (OllamaUnreachable, OllamaError, OSError, psutil.Error)


class Polled[T]:
    """The latest value of a part, and how the latest attempt to read it went."""

    def __init__(
        self,
        part: str,
        read: Callable[[], Awaitable[T]],
        *,
        every_s: float,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.part = part
        self.value: T | None = None
        self.read_at_s: float | None = None
        self.sampled_at: datetime | None = None
        self.error: str | None = None
        self.failures = 0
        self._read = read
        self._every_s = every_s
        self._deadline_s = deadline_s
        self._clock = clock

    async def run(self) -> None:
        """Refresh every ``every_s`` until cancelled; a refresh that took longer skips the beats it missed."""
        beat_s = self._clock()
        while True:
            await self.refresh()
            missed = max(0, int((self._clock() - beat_s) / self._every_s))
            beat_s += (missed + 1) * self._every_s
            await asyncio.sleep(beat_s - self._clock())

    async def refresh(self) -> None:
        """Read once; a failure is kept in ``error`` and leaves the last value. Only cancelling raises."""
        try:
            async with asyncio.timeout(self._deadline_s):
                value = await self._read()
        except TimeoutError:
            self._failed(f"no answer within {self._deadline_s:g} s")
        except EXPECTED as error:
            self._failed(str(error))
        except Exception as error:  # the boundary: one part's bug must not cost the others
            if self.error is None:
                logger.exception("reading %s failed", self.part)
            self._failed(f"{type(error).__name__}: {error}")
        else:
            if self.error is not None:
                logger.info("%s is fresh again", self.part)
            self.value, self.error = value, None
            self.read_at_s, self.sampled_at = self._clock(), datetime.now(UTC)

    def staleness(self, now_s: float) -> str | None:
        """Return why the value is old and how old it is, None if the latest attempt succeeded."""
        if self.error is None:
            return None
        if self.read_at_s is None:
            return f"{self.error}; never read"
        return f"{self.error}; last read {now_s - self.read_at_s:.0f} s ago"

    def _failed(self, reason: str) -> None:
        if self.error is None:  # the first of a row: a machine without its driver shall not fill the log
            logger.warning("%s is stale: %s", self.part, reason)
        self.error = reason
        self.failures += 1
