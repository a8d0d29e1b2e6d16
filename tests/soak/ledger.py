"""What really befell the fleet, as intervals, and what follows from it. Times are of the monotonic clock.

The judgement must never blame the proxy for what it could not know, so everything here errs on its side: a
fault begins before its signal is sent and ends when the node was seen to answer; a model is gone before its
delete is asked for and there once its pull has been confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

#: How long a node must have been well, or a model held, until a request counts on it. The proxy learns of
#: both by its polls: every 0.5 s, the models every fifth (``house.SETTINGS``, ``node_watch.SLOW_EVERY``),
#: with 2 s for each answer. On top of that, a failing node is ejected for up to 4 s at its second ejection in
#: a row.
GRACE_S = 10.0


@dataclass
class Span:
    """Something that lasted."""

    who: str
    what: str
    from_s: float
    to_s: float = inf

    def overlaps(self, from_s: float, to_s: float, after_s: float = 0.0) -> bool:
        """Whether it, or the ``after_s`` after its end, had a moment in common with an interval."""
        return self.from_s <= to_s and from_s <= self.to_s + after_s


@dataclass
class Ledger:
    """Troubles of nodes (and of the ``proxy``), and who held which model when."""

    troubles: list[Span] = field(default_factory=list)
    holdings: list[Span] = field(default_factory=list)

    def trouble(self, who: str, what: str, at_s: float) -> Span:
        """Something is wrong with ``who`` from now on, until the span's ``to_s`` is set."""
        self.troubles.append(Span(who, what, at_s))
        return self.troubles[-1]

    def gains(self, node: str, model: str, at_s: float) -> None:
        """``node`` holds ``model`` from now on."""
        self.holdings.append(Span(node, model, at_s))

    def loses(self, model: str, at_s: float, node: str | None = None) -> None:
        """``node`` (None: everybody) does not hold ``model`` from now on."""
        for span in self.holdings:
            if span.what == model and node in (None, span.who) and span.to_s == inf:
                span.to_s = at_s

    def in_trouble(self, who: str, from_s: float, to_s: float, after_s: float = 0.0) -> list[Span]:
        """What was wrong with ``who`` at any moment of an interval, or up to ``after_s`` before it."""
        return [span for span in self.troubles if span.who == who and span.overlaps(from_s, to_s, after_s)]

    def healthy_holder(self, model: str, from_s: float, to_s: float) -> str | None:
        """A node that was well and held ``model`` for a whole interval and ``GRACE_S`` before it."""
        for span in self.holdings:
            held = span.what == model and span.from_s + GRACE_S <= from_s and to_s < span.to_s
            if held and not self.in_trouble(span.who, from_s, to_s, GRACE_S):
                return span.who
        return None

    def states(self, from_s: float, to_s: float) -> list[str]:
        """What was wrong in an interval, for a reader."""
        return [
            f"{s.who} {s.what} {s.from_s - from_s:+.2f}…{s.to_s - from_s:+.2f} s"
            for s in self.troubles
            if s.overlaps(from_s, to_s, GRACE_S)
        ]
