"""How much may wait, and how much one client may ask: pure, time is an argument.

The line's own limits (its length, the longest wait) are 503, those of a client 429; each with the seconds
after which it is worth to ask again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from proxy_addon.settings import ClientClass

RETRY_AFTER_S = (1, 60)  #: the least and the most that a refused client is told to wait
ENDING_RETRY_S = 2.0  #: a proxy that ends is mostly one that is started again
IDLE_CLIENTS = 1000  #: so many are kept before those that hold nothing are forgotten


class Refused(Exception):
    """A request that is not served now. ``message`` goes to the client; ``reason`` is the metric's label."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds."""
        least, most = RETRY_AFTER_S
        return {"retry-after": str(max(least, min(most, math.ceil(self.retry_after_s))))}


def queue_full(limit: int, expected_wait_s: float) -> Refused:
    """So many wait already."""
    text = f"{limit} requests are waiting already (admission.max_queue); try again later"
    return Refused(503, "queue_full", text, expected_wait_s)


def waited_too_long(limit_s: float, expected_wait_s: float) -> Refused:
    """No slot was found in time."""
    text = f"no node had time for this request within {limit_s:g} s (admission.max_wait_s)"
    return Refused(503, "max_wait", text, expected_wait_s)


def ending() -> Refused:
    """The proxy is on its way out."""
    return Refused(503, "shutdown", "SOLLOL is shutting down", ENDING_RETRY_S)


@dataclass(slots=True)
class Bucket:
    """A token bucket: ``burst`` at once, ``rate_per_s`` in the long run."""

    rate_per_s: float
    burst: int
    tokens: float
    at_s: float

    def take(self, now_s: float) -> float:
        """0 if one more may pass, which is then counted; else the seconds until one may."""
        self._fill(now_s)
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate_per_s
        self.tokens -= 1
        return 0.0

    def full(self, now_s: float) -> bool:
        """Whether it is as it was in the beginning."""
        self._fill(now_s)
        return self.tokens >= self.burst

    def _fill(self, now_s: float) -> None:
        self.tokens = min(self.burst, self.tokens + (now_s - self.at_s) * self.rate_per_s)
        self.at_s = now_s


@dataclass(slots=True)
class _Client:
    in_flight: int = 0
    bucket: Bucket | None = None


@dataclass(slots=True)
class Limits:
    """What each client has here now, where its class limits it."""

    _clients: dict[tuple[str, str], _Client] = field(default_factory=dict)

    def enter(self, of: ClientClass, client: str, now_s: float) -> None:
        """Count one request of ``client``, who is one of the class ``of``. Raises Refused (429)."""
        if of.max_in_flight is None and of.rate_per_s is None:
            return
        if len(self._clients) >= IDLE_CLIENTS:
            self._forget(now_s)
        here = self._clients.setdefault((of.name, client), _Client())
        if of.max_in_flight is not None and here.in_flight >= of.max_in_flight:
            raise Refused(
                429,
                "in_flight",
                f"{of.name} has {here.in_flight} requests here, as many as it may have at once",
                RETRY_AFTER_S[0],
            )
        if of.rate_per_s is not None:
            if here.bucket is None:
                here.bucket = Bucket(of.rate_per_s, of.burst, of.burst, now_s)
            here.bucket.rate_per_s, here.bucket.burst = of.rate_per_s, of.burst  # as they are by now
            if (wait_s := here.bucket.take(now_s)) > 0:
                text = f"{of.name} may ask {of.rate_per_s:g} times a second, {of.burst} times at once"
                raise Refused(429, "rate", text, wait_s)
        here.in_flight += 1

    def leave(self, of: ClientClass, client: str) -> None:
        """One request that was let in has ended."""
        here = self._clients.get((of.name, client))
        if here is None:
            return
        here.in_flight -= 1
        if not here.in_flight and here.bucket is None:
            del self._clients[of.name, client]

    def _forget(self, now_s: float) -> None:
        self._clients = {
            key: here
            for key, here in self._clients.items()
            if here.in_flight or (here.bucket is not None and not here.bucket.full(now_s))
        }
