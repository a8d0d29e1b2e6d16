"""An orderly end: no new work, who waits is refused, answers in progress finish, within a limit.

SIGTERM (and the first SIGINT) begins it; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from mitmproxy import ctx, http

from proxy_addon import errors, record

log = logging.getLogger("sollol")

TELL_S = 2.0  #: for the last words to those who are cut off


class Drain:
    """Counts the requests under way, and refuses new ones once the end has begun."""

    def __init__(self, abort_all: Callable[[str], None], refuse_waiting: Callable[[], None]) -> None:
        self.ending = False
        self._abort_all = abort_all
        self._refuse_waiting = refuse_waiting
        self._open: set[str] = set()  # ids of flows
        self._empty = asyncio.Event()
        self._empty.set()

    def under_way(self) -> int:
        """How many requests have begun and not ended."""
        return len(self._open)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A kept connection may still bring a request after the ports were closed."""
        rec = record.of(flow)
        if rec is None or flow.response is not None:
            return
        if self.ending:
            headers = {"retry-after": "2", "connection": "close"}
            text = "SOLLOL is shutting down"
            flow.response = errors.response(rec.protocol, 503, text, request_id=rec.id, headers=headers)
            return
        self._open.add(flow.id)
        self._empty.clear()

    def response(self, flow: http.HTTPFlow) -> None:
        """Answered."""
        self.let_go(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        """Broken off, on either side."""
        self.let_go(flow)

    def let_go(self, flow: http.HTTPFlow) -> None:
        """It is not under way any more."""
        self._open.discard(flow.id)
        if not self._open:
            self._empty.set()

    async def wait(self, limit_s: float) -> None:
        """Close the ports and return when the last answer has ended, at the latest after ``limit_s``."""
        self.ending = True
        self._refuse_waiting()
        ctx.options.update(server=False)
        if self._open:
            log.info("Shutting down: %d answers in progress have up to %g s.", len(self._open), limit_s)
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("Shutting down with %d answers cut off after %g s.", len(self._open), limit_s)
            self._abort_all("SOLLOL is shutting down")  # each is told so in its own protocol
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._empty.wait()
