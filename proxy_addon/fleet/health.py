"""Whether a node may be sent work: passive ejection with exponential back-off, and a gradual return.

A pure state machine; time is an argument. The doubling with a cap is Envoy's outlier detection
(``base_ejection_time`` × number of ejections); the return with a growing number of requests is nginx'
``slow_start`` idea in steps, since whole requests, not rates, are what an LLM node is given.
"""

from __future__ import annotations

from dataclasses import dataclass

FAILURES_TO_EJECT = 3  #: consecutive failures of requests; a refused connection ejects at once
BASE_EJECTION_S = 2.0
MAX_EJECTION_S = 60.0


@dataclass(slots=True)
class Health:
    """Consecutive failures, the current ejection, and how far the node has come back."""

    failures: int = 0
    ejections: int = 0
    ejected_until_s: float = 0.0
    reason: str | None = None
    allowance: int | None = None  #: requests at a time while coming back; None: no limit

    def ejected(self, now_s: float) -> bool:
        """Whether the node is out at ``now_s``."""
        return now_s < self.ejected_until_s

    def failed(self, now_s: float, reason: str, fatal: bool = False) -> bool:
        """Count a failure; ``fatal`` ones (refused, reset, hung) eject at once. Returns whether it is out."""
        self.failures += 1
        self.reason = reason
        if (fatal or self.failures >= FAILURES_TO_EJECT) and not self.ejected(now_s):
            self.ejected_until_s = now_s + min(BASE_EJECTION_S * 2**self.ejections, MAX_EJECTION_S)
            self.ejections += 1
            self.allowance = 1
        return self.ejected(now_s)

    def succeeded(self) -> None:
        """Count a success: failures are forgotten, a returning node may carry twice as many at a time."""
        self.failures = 0
        self.reason = None
        if self.allowance is not None:
            self.allowance *= 2
            if self.allowance > 8:  # enough for any one node to be at work fully
                self.allowance = None
                self.ejections = 0

    def polled(self) -> None:
        """The node answered an active poll after it was unreachable: let one request try it."""
        self.failures = 0
        if self.allowance is None and self.ejections:
            self.allowance = 1

    def admits(self, in_flight: int) -> bool:
        """Whether a node with ``in_flight`` requests may be given one more while it comes back."""
        return self.allowance is None or in_flight < self.allowance
