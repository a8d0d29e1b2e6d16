"""How many sequences a node decodes, as a mean over the time that one of them took.

A request that had the node to itself but for its last instant did not share it, whatever was in flight at its
end. So the counts are integrated over time: at each change, and not per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Mark(NamedTuple):
    """The sums at one moment, for one model."""

    at_s: float
    sequences: float
    runners: float


class Company(NamedTuple):
    """What a request's model ran beside, on average."""

    sequences: float = 1.0  #: of the same model, itself included
    runners: float = 0.0  #: other models that were at work


@dataclass(slots=True)
class Crowd:
    """The integrals of one node, in seconds."""

    at_s: float = 0.0
    sequences: dict[str, float] = field(default_factory=dict)  #: by model
    runners: float = 0.0

    def advance(self, decoded: Mapping[str, int], slots: int, now_s: float) -> None:
        """Until ``now_s`` the node decoded so many requests by model, of which ``slots`` each at a time."""
        passed_s = max(now_s - self.at_s, 0.0)
        self.at_s = now_s
        for key, count in decoded.items():
            self.runners += passed_s
            self.sequences[key] = self.sequences.get(key, 0.0) + min(count, slots) * passed_s

    def mark(self, key: str) -> Mark:
        """The sums up to the last change."""
        return Mark(self.at_s, self.sequences.get(key, 0.0), self.runners)

    def since(self, mark: Mark, key: str) -> Company:
        """What a request of the model ``key`` ran beside between ``mark`` and the last change."""
        passed_s = self.at_s - mark.at_s
        if passed_s <= 0:
            return Company()
        sequences = (self.sequences.get(key, 0.0) - mark.sequences) / passed_s
        runners = (self.runners - mark.runners) / passed_s
        return Company(max(sequences, 1.0), max(runners - 1, 0.0))
