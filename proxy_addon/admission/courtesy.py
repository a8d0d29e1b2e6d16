"""Whose turn it is where several proxies have a line for the same model: pure, time is an argument.

A proxy knows first that its own request has ended. If it gave each slot to its own line at once, the lines of
others would stand still for as long as its own lasts. So who has started one from its line lets the others
have the next slot, for as long as they need to hear of it; and a more urgent line goes before a less urgent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: How long a slot is left to others. They hear of it and are heard of within four messages of at most 20 ms
#: (``agent/in_flight.py``); who does not take it by then does not want it.
LEFT_S = 0.1


@dataclass(slots=True)
class Courtesy:
    """``elsewhere(model)`` is the highest priority that waits for it at another proxy, or None."""

    elsewhere: Callable[[str], int | None]
    _ours_last: set[str] = field(default_factory=set)  #: models of which we, not others, started the last one
    _left_s: dict[str, float] = field(default_factory=dict)  #: since when a slot is left to others, by model

    def until_s(self, key: str, priority: int, now_s: float) -> float | None:
        """Until when one of ours for the model ``key`` leaves a free slot to others; None: it goes now."""
        top = self.elsewhere(key)
        if top is None or top < priority or (top == priority and key not in self._ours_last):
            self._left_s.pop(key, None)
            return None
        until_s = self._left_s.setdefault(key, now_s) + LEFT_S
        return until_s if now_s < until_s else None

    def started(self, key: str) -> None:
        """One of ours for the model ``key`` was started."""
        self._left_s.pop(key, None)
        if self.elsewhere(key) is not None:
            self._ours_last.add(key)

    def seen(self, key: str) -> None:
        """Another proxy has started one."""
        self._left_s.pop(key, None)
        self._ours_last.discard(key)
