"""Decisions that were journalled, made again under other settings. Pure functions.

Made again is the choice alone, from what was known of each candidate then. Who was a candidate, and all that
led to what was known (queues, models in memory, learned speeds) stays as it was.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from agent.ollama import names
from proxy_addon.entry import Entry
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.policies import POLICIES, choose
from proxy_addon.telemetry import quantile

#: What of ``finish_time`` is the request's own time; the rest of its cost is other requests' or unlikely.
SECONDS = ("wait_s", "load_s", "prefill_s", "decode_s")
AS_IT_WAS: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Other:
    """Settings in place of those that were in force; what is not set stays as it was at the time."""

    placement: str | None = None
    specialise: Mapping[str, tuple[str, ...]] = AS_IT_WAS  #: kind of task → its nodes, for these kinds
    specialise_factor: float | None = None
    ahead_s: float = 0.0  #: a node whose slot is free within that has one free


@dataclass(frozen=True, slots=True)
class Again:
    """One decision as it was and as it would have been, with the seconds expected by ``finish_time``."""

    id: str  #: of the request
    decision: int  #: of the request's, from 1 on: a request that failed on a node was placed again
    at: str
    client: str
    model: str
    before: str
    after: str
    before_s: float
    after_s: float

    @property
    def moved(self) -> bool:
        """Whether it would have gone elsewhere."""
        return self.before != self.after


@dataclass(slots=True)
class Replayed:
    """What came of all of them."""

    again: list[Again] = field(default_factory=list)
    requests: int = 0  #: whose decisions these are
    bare: int = 0  #: decisions of which the journal does not say what they were made of
    partial: int = 0  #: decisions among so many nodes that not all of them were worked out and kept


def replay(entries: Iterable[Entry], other: Other) -> Replayed:
    """Make all decisions of ``entries`` again; those that chose nobody have nothing to be compared with."""
    done = Replayed()
    for entry in entries:
        placed = [d for d in entry["decisions"] if isinstance(d, dict) and d.get("node") is not None]
        done.requests += bool(placed)
        for number, decision in enumerate(placed, 1):
            try:
                done.again.append(_again(entry, number, decision, other))
            except (LookupError, TypeError, ValueError, ArithmeticError):  # of another version, or damaged
                done.bare += 1
            else:
                done.partial += bool(decision.get("unseen"))
    return done


def _again(entry: Entry, number: int, decision: Mapping[str, Any], other: Other) -> Again:
    ask, rows = _under(other, *_known(decision))
    before = next(row for row in rows if row.node == decision["node"])
    policy = other.placement or decision["policy"]
    if policy != decision["policy"]:
        rows = _offered(policy, ask, rows, other.ahead_s)
    after = rows[choose(policy, ask, rows)]
    return Again(
        *(entry["id"], number, entry["at"], entry["client"], names.display(entry["model"])),
        *(before.node, after.node),
        *(_expected_s(ask, before), _expected_s(ask, after)),
    )


def _known(decision: Mapping[str, Any]) -> tuple[AskFeatures, list[Features]]:
    rows = [Features.from_row(row["features"]) for row in decision["candidates"] if not row.get("excluded")]
    if all(row.node != decision["node"] for row in rows):
        raise LookupError(decision["node"])
    return AskFeatures.from_row(decision["ask"]), rows


def _under(
    other: Other, ask: AskFeatures, rows: Sequence[Features]
) -> tuple[AskFeatures, Sequence[Features]]:
    """What would have been known under ``other``."""
    if other.specialise_factor is not None:
        ask = replace(ask, specialise_factor=other.specialise_factor)
    if (named := other.specialise.get(ask.kind)) is not None:
        # Where none of them may serve, all others are outside alike, which changes nothing.
        rows = [replace(row, outside=bool(named) and row.node not in named) for row in rows]
    return ask, rows


def _offered(policy: str, ask: AskFeatures, rows: Sequence[Features], ahead_s: float) -> Sequence[Features]:
    """Those of ``rows`` that admission would let ``policy`` choose from.

    Where it does not count seconds, it is asked among the nodes that have a slot free, if there are any.
    """
    if "wait_s" in POLICIES[policy].terms(ask, rows[0]):
        return rows
    return [row for row in rows if row.wait_s <= ahead_s] or rows


def _expected_s(ask: AskFeatures, row: Features) -> float:
    terms = POLICIES["finish_time"].terms(ask, row)
    return sum(terms[name] for name in SECONDS)


@dataclass(frozen=True, slots=True)
class Summary:
    """Decisions in sum: how many would have gone elsewhere, and the seconds that were expected."""

    model: str | None  #: None: all of them
    placed: int
    moved: int
    mean_before_s: float
    mean_after_s: float
    p99_before_s: float
    p99_after_s: float


def summaries(again: Sequence[Again]) -> Iterator[Summary]:
    """One for all, then one for each model, the most asked for first."""
    by_model: defaultdict[str, list[Again]] = defaultdict(list)
    for each in again:
        by_model[each.model].append(each)
    yield _summary(None, again)
    for model in sorted(by_model, key=lambda model: (-len(by_model[model]), model)):
        yield _summary(model, by_model[model])


def _summary(model: str | None, again: Sequence[Again]) -> Summary:
    before_s, after_s = sorted(each.before_s for each in again), sorted(each.after_s for each in again)
    return Summary(
        *(model, len(again), sum(each.moved for each in again)),
        *(sum(before_s) / len(again), sum(after_s) / len(again)),
        *(quantile(before_s, 0.99), quantile(after_s, 0.99)),
    )


def moves(again: Iterable[Again]) -> list[tuple[str, str, int]]:
    """From where to where how many would have moved, the most frequent first."""
    counted = Counter((each.before, each.after) for each in again if each.moved)
    return [(before, after, count) for (before, after), count in counted.most_common()]
