"""What must never be, of one request: pure functions of what the client saw and what befell the fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.soak.house import SETTINGS
from tests.soak.ledger import GRACE_S, Ledger
from tests.soak.outcome import LIMIT_S, Outcome

#: A client's timer may fire late on a busy machine.
LATE_S = 5.0
SHUTTING_DOWN = "shutting down"  #: in the sentence of a proxy that is about to end


@dataclass(frozen=True)
class Violation:
    """What must not be."""

    outcome: Outcome
    what: str
    states: list[str]

    def text(self, zero_s: float) -> str:
        """For a reader: the request, when, and what was wrong with whom then (seconds from its start)."""
        o = self.outcome
        retries = dict(Counter(retry.why for retry in o.retries))
        lines = (
            f"{self.what}",
            f"  request {o.id} ({o.request_id or 'no id'}): {o.shape}, {o.model}, {o.manner}, "
            f"{'fresh' if o.fresh else 'kept'} connection, on {o.node or 'no node'}",
            f"  sent at {o.sent_s - zero_s:.2f} s, ended after {o.ended_s - o.sent_s:.2f} s: {o.end}, "
            f"HTTP {o.status}, {o.tokens} tokens, retries {retries}: {o.detail}",
            f"  meanwhile: {'; '.join(self.states) or 'all well'}",
        )
        return "\n".join(lines)


def judge(outcomes: Iterable[Outcome], ledger: Ledger) -> list[Violation]:
    """Every violation among ``outcomes``."""
    return [
        Violation(outcome, what, ledger.states(outcome.sent_s, outcome.ended_s))
        for outcome in outcomes
        for what in (*_of_end(outcome, ledger), *_of_retries(outcome, ledger))
    ]


def excused(outcome: Outcome, ledger: Ledger) -> bool:
    """Whether the request was turned away, in words, by a proxy that was about to be restarted."""
    restarts = ledger.in_trouble("proxy", outcome.sent_s, outcome.ended_s)
    ending = any(span.what == "restart" for span in restarts)
    return ending and outcome.status == 503 and SHUTTING_DOWN in outcome.detail


def _of_end(outcome: Outcome, ledger: Ledger) -> Iterator[str]:
    if outcome.ended_s - outcome.sent_s > LIMIT_S + outcome.slept_s + LATE_S:
        yield "it ended after its limit"
    what = _ENDS[outcome.end](outcome, ledger)
    if what:
        yield what


def _of_retries(outcome: Outcome, ledger: Ledger) -> list[str]:
    for retry in outcome.retries:
        renewals = ledger.in_trouble("proxy", retry.at_s, retry.at_s)
        if not renewals:
            return [f"a connection was {retry.why} while no proxy was restarted"]
        if all(span.what == "upgrade" for span in renewals):
            return [f"a connection was {retry.why} in an upgrade"]
    return []


def _cut(outcome: Outcome, ledger: Ledger) -> str:
    """An answer that had begun may only be cut where its node was hurt, or a drain came to its limit."""
    if ledger.in_trouble(outcome.node, outcome.sent_s, outcome.ended_s, GRACE_S):
        return ""
    drain_s = SETTINGS["timeouts"]["drain_s"]
    for span in ledger.in_trouble("proxy", outcome.sent_s, outcome.ended_s):
        if outcome.ended_s >= span.from_s + drain_s:
            return ""
    return "an answer was cut though its node was well"


def _failed(outcome: Outcome, ledger: Ledger) -> str:
    if outcome.status is None or (outcome.status < 500 and outcome.status not in (404, 429)):
        return f"HTTP {outcome.status} for a request that is right"
    if excused(outcome, ledger):
        return ""
    from_s = outcome.retries[-1].at_s if outcome.retries else outcome.sent_s
    holder = ledger.healthy_holder(outcome.model, from_s, outcome.ended_s)
    return f"it failed while {holder} was well and held the model" if holder else ""


_ENDS: dict[str, Callable[[Outcome, Ledger], str]] = {
    "ok": lambda _outcome, _ledger: "",
    "left": lambda _outcome, _ledger: "",
    "hang": lambda _outcome, _ledger: "it hung",
    "wrong": lambda _outcome, _ledger: "a wrong answer",
    "silent": lambda _outcome, _ledger: "an answer broke off without a word",
    "broken": lambda _outcome, _ledger: "the connection broke without an answer",
    "cut": _cut,
    "failed": _failed,
}
