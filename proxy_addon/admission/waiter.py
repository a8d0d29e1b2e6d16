"""A request before the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from proxy_addon.admission.line import Item
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.placement.decision import Decision

NOTHING: Mapping[str, str] = MappingProxyType({})

Kind = tuple[str, Task, int]  #: who uses the same slots at the same priority: model, task, priority


@dataclass(eq=False, slots=True, kw_only=True)
class Waiter(Item):
    """Kept over failures, so that a request that comes back stands where it stood."""

    id: str
    ask: Ask
    excluded: Mapping[str, str] = NOTHING  #: nodes that it was tried on, and why they are out
    position: int | None = None  #: in the line when it joined; None: it has not waited
    expected_wait_s: float = 0.0  #: as it was then
    waited_s: float = 0.0  #: each time that is over, together
    joined_s: float | None = None  #: in the line since then
    answer: asyncio.Future[Decision | None] | None = None  #: who waits for its turn

    @property
    def kind(self) -> Kind:
        """What it has in common with others that wait."""
        return self.ask.key, self.ask.task, self.priority

    def so_far_s(self, now_s: float) -> float:
        """How long it has waited."""
        return self.waited_s + (0.0 if self.joined_s is None else now_s - self.joined_s)

    def left(self, now_s: float) -> None:
        """It stands in line no more."""
        self.waited_s, self.joined_s = self.so_far_s(now_s), None

    def tell(self, outcome: Decision | Exception | None) -> None:
        """Its turn has come, or will not."""
        if self.answer is None or self.answer.done():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a waiter stands now."""

    waiter: Waiter
    position: int
    waited_s: float
    expected_wait_s: float
