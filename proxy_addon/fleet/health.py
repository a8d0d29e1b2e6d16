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
FULL_RETURN = 8  #: requests at a time that keep any one node at work; who carries them is back for good


@dataclass(slots=True)
class Health:
    """Consecutive failures, the current ejection, and how far the node has come back."""

    failures: int = 0
    ejections: int = 0  #: since the node was last back for good
    ejected_until_s: float = 0.0
    reason: str | None = None
    allowance: int | None = None  #: requests at a time while coming back; None: no limit

    def ejected(self, now_s: float) -> bool:
        """Whether the node is out at ``now_s``."""
        return now_s < self.ejected_until_s

    def failed(self, now_s: float, reason: str, fatal: bool = False) -> bool:
        """Count a failure and return whether the node is out.

        Ejected at once are ``fatal`` failures (a refused connection, the host check) and those of a node that
        is on trial, which has not carried a request since it came back. What still fails during an ejection
        was sent before it and does not prolong it.
        """
        self.failures += 1
        self.reason = reason
        on_trial = self.allowance == 1
        if (fatal or on_trial or self.failures >= FAILURES_TO_EJECT) and not self.ejected(now_s):
            # 2 to the 10th is beyond the cap; without a bound the power outgrows a float.
            self.ejected_until_s = now_s + min(BASE_EJECTION_S * 2 ** min(self.ejections, 10), MAX_EJECTION_S)
            self.ejections += 1
            self.allowance = 1
        return self.ejected(now_s)

    def succeeded(self) -> None:
        """Count a success: failures are forgotten, a returning node may carry twice as many at a time."""
        self.failures = 0
        self.reason = None
        if self.allowance is not None:
            self.allowance *= 2
            if self.allowance > FULL_RETURN:
                self.allowance = None
                self.ejections = 0

    def polled(self) -> None:
        """The node answers polls again after it was lost: let one request try it.

        An ejection that requests have brought stays: an answer to a poll does not show that work succeeds.
        """
        self.failures = 0
        self.allowance = 1

    def admits(self, in_flight: int) -> bool:
        """Whether a node with ``in_flight`` requests may be given one more while it comes back."""
        return self.allowance is None or in_flight < self.allowance
