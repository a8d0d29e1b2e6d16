"""Whether a node answers, as a state machine over the results of its polls. Pure; time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Change = Literal["up", "lost", "back"]


@dataclass(slots=True)
class Liveness:
    """What the polls of one node say together. Each method returns the change it brought, None for none."""

    failures_to_lose: int
    state: Literal["unknown", "up", "lost"] = "unknown"
    seen: bool = False  #: it has answered once
    failures: int = 0  #: in a row
    since_s: float = 0.0  #: when the state began

    def answered(self, now_s: float) -> Change | None:
        """Count an answer: ``up`` for the first ever, ``back`` for the first after a loss."""
        self.failures = 0
        if self.state == "up":
            return None
        change: Change = "back" if self.seen else "up"
        self.state, self.seen, self.since_s = "up", True, now_s
        return change

    def failed(self, now_s: float, at_once: bool = False) -> Change | None:
        """Count a poll without an answer; ``at_once`` (a refused connection) needs no second one."""
        self.failures += 1
        if self.state == "lost" or not (at_once or self.failures >= self.failures_to_lose):
            return None
        self.state, self.since_s = "lost", now_s
        return "lost"
