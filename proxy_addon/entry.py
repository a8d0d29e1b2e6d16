"""One request in the journal: packed for the disk, unpacked for people and for replay. Pure functions.

Most of a request's line is what was known of each candidate, so these are rows without names: the names of
their columns stand once at the head of each file (:data:`HEADER`) and hold for the lines below it. A line is
unpacked by the columns that it was written under, whatever the columns are today; lines of earlier versions,
which spell every name out, stay as they are.

What follows from these rows by the policy alone (each candidate's terms, the reason in words) is not written
but worked out when it is read: hardly any line ever is, and a request waits while its own is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from math import isfinite
from operator import attrgetter
from typing import Any

from proxy_addon.placement.decision import Candidate, Decision, reason
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.policies import POLICIES
from proxy_addon.record import Attempt, Record

Entry = dict[str, Any]

CANDIDATES = 50  #: in an entry; of a larger fleet the cheapest, with the number left out, and of those who
#: might have served it the number that are ``unseen``: left out, or never worked out as they could not win

#: Of an ask, what an entry says.
ASK_FIELDS = (
    *("model", "stream", "num_ctx", "prompt_tokens", "max_tokens", "images", "tools"),
    *("priority", "kind", "complexity", "requires_gpu"),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of what stands in rows: the features of the ask, and those of each node."""

    ask: tuple[str, ...]
    node: tuple[str, ...]

    @classmethod
    def of_header(cls, line: Mapping[str, Any]) -> Columns | None:
        """Those that the line names, if it is a header."""
        match line.get("columns"):
            case {"ask": [*ask], "node": [*node]} if all(isinstance(name, str) for name in (*ask, *node)):
                return cls(tuple(ask), tuple(node))
        return None


NONE = Columns((), ())  #: above the first header
#: Today's. A candidate has its name and its notes whether or not its features are known.
CURRENT = Columns(
    tuple(field.name for field in fields(AskFeatures)),
    tuple(field.name for field in fields(Features) if field.name not in ("node", "notes")),
)
HEADER = {"columns": {"ask": CURRENT.ask, "node": CURRENT.node}}
_ask_row = attrgetter(*CURRENT.ask)
_node_row = attrgetter(*CURRENT.node)
_whole_row = attrgetter("node", *CURRENT.node, "notes")
_ask_fields = attrgetter(*ASK_FIELDS)


def pack(record: Record, ended_at: datetime) -> Entry:
    """``record`` as one line of the journal, under :data:`CURRENT`; all seconds count from its start."""
    started_s, ask, attempts = record.started_s, record.ask, record.attempts
    duration_s = _since(started_s, record.ended_s) or 0.0
    second, part_us = divmod(round((ended_at.timestamp() - duration_s) * 1e6), 1_000_000)
    made: Entry = {
        "id": record.id,
        "at": f"{_date(second)}.{part_us // 1000:03}+00:00",
        "client": (ask.client if ask else "") or record.client,
        "protocol": record.protocol,
        "path": record.endpoint.path if record.endpoint else None,
        "outcome": record.outcome,
        "status": record.status,
        "node": attempts[-1].node if attempts else None,
        "duration_s": duration_s,
        "first_byte_s": _since(started_s, record.first_byte_s),
        "queued_s": None if record.queued_s is None else round(record.queued_s, 6),
        "queue_position": record.queue_position,
        "expected_wait_s": None if record.expected_wait_s is None else round(record.expected_wait_s, 6),
    }
    if ask is not None:
        made |= zip(ASK_FIELDS, _ask_fields(ask), strict=True)
        made["task"] = ask.task.value
    made["decisions"] = [_decision(decision) for decision in record.decisions]
    made["attempts"] = [_attempt(attempt, started_s) for attempt in attempts]
    made["stats"] = record.stats  # a dataclass of plain values, which orjson writes as it is
    if record.shard_plan is not None:
        made["shard_plan"] = record.shard_plan
    return made


@lru_cache(maxsize=8)
def _date(second: int) -> str:
    """As in :meth:`datetime.isoformat`, which takes long, and is the same for all of a second."""
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _since(started_s: float, moment_s: float | None) -> float | None:
    return None if moment_s is None else round(moment_s - started_s, 6)


def _attempt(attempt: Attempt, started_s: float) -> Entry:
    return {
        "node": attempt.node,
        "started_s": _since(started_s, attempt.started_s),
        "ended_s": _since(started_s, attempt.ended_s),
        "outcome": attempt.outcome,
        "detail": attempt.detail,
    }


def _decision(decision: Decision) -> Entry:
    if decision.how is None or len(decision.rows) + len(decision.out) > CANDIDATES:
        return _spelt_out(decision)
    made: Entry = {
        "policy": decision.policy,
        "node": decision.node,
        "remark": decision.remark,
        "ask": _ask_row(decision.ask),
        "out": decision.out,
        "costs": decision.costs,
        "rows": [*map(_whole_row, decision.rows)],
    }
    if decision.left:
        made["unseen"] = decision.left
    return made


def _spelt_out(decision: Decision) -> Entry:
    """One that was not made of rows, or of so many that some are left out."""
    candidates: Sequence[Candidate] = decision.candidates
    left_out = len(candidates) - CANDIDATES
    if left_out > 0:
        candidates = sorted(candidates, key=lambda c: (c.node != decision.node, c.cost))[:CANDIDATES]
    terms = next((list(c.terms) for c in candidates if c.terms), [])  # the same of all, by the policy
    rows = {row.node: _node_row(row) for row in decision.rows}
    made: Entry = {
        "policy": decision.policy,
        "node": decision.node,
        "reason": decision.reason,
        "terms": terms,
        "ask": _ask_row(decision.ask) if decision.ask is not None else None,
        "candidates": [
            (c.node, c.excluded) if c.excluded else (c.node, _values(c, terms), c.notes, rows.get(c.node))
            for c in candidates
        ],
    }
    if left_out > 0:
        made["candidates_left_out"] = left_out
    if unseen := decision.left + max(len(rows) - CANDIDATES, 0):  # those who may not serve come last
        made["unseen"] = unseen
    return made


def _values(candidate: Candidate, terms: list[str]) -> list[float | None]:
    """Its cost and its ``terms``, to millionths; what is missing or infinite is null."""
    named = candidate.terms
    values = [candidate.cost, *(named.values() if list(named) == terms else map(named.get, terms))]
    try:
        # A quarter of the time of round(value, 6), and most of them are 0.
        return [value and round(value * 1e6) / 1e6 for value in values]
    except (TypeError, OverflowError, ValueError):
        return [value if value is not None and isfinite(value) else None for value in values]


def unpack(packed: Entry, columns: Columns) -> Entry:
    """The line ``packed``, written under ``columns``, with every value's name beside it.

    Raises ValueError for what is no entry of this or an earlier version.
    """
    try:
        return packed | {"decisions": [_named(decision, columns) for decision in packed["decisions"]]}
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as exc:
        raise ValueError(f"not an entry of the journal: {exc}") from exc


def _named(decision: Entry, columns: Columns) -> Entry:
    if "rows" in decision:
        return _worked_out(decision, columns)
    made = dict(decision)
    terms = made.pop("terms", ())
    if isinstance(decision.get("ask"), list):
        made["ask"] = dict(zip(columns.ask, decision["ask"], strict=True))
    made["candidates"] = [
        _candidate(row, terms, columns.node) if isinstance(row, list) else row
        for row in decision["candidates"]
    ]
    return made


def _candidate(row: list[Any], terms: Sequence[str], columns: Sequence[str]) -> Entry:
    if len(row) == 2:
        return {"node": row[0], "excluded": row[1]}
    node, (cost, *values), notes, known = row
    made_of = {name: value for name, value in zip(terms, values, strict=True) if value is not None}
    made = {"node": node, "cost": cost, "terms": made_of, "notes": notes}
    if known is not None:
        named = zip(columns, known, strict=True)
        made["features"] = {"node": node, **dict(named), "notes": notes}
    return made


def _worked_out(decision: Entry, columns: Columns) -> Entry:
    """What follows from the rows of ``decision``, by its policy as it is today.

    Costs and rows are those that were decided on.
    """
    asked = dict(zip(columns.ask, decision["ask"], strict=True))
    how, ask, node = POLICIES.get(decision["policy"]), AskFeatures.from_row(asked), decision["node"]
    made: Entry = {"policy": decision["policy"], "node": node, "reason": decision["remark"], "ask": asked}
    made["candidates"] = [{"node": name, "excluded": why} for name, why in decision["out"]]
    for cost, (name, *known, notes) in zip(decision["costs"], decision["rows"], strict=True):
        features = {"node": name, **dict(zip(columns.node, known, strict=True)), "notes": notes}
        row = Features.from_row(features)
        terms = how.terms(ask, row) if how is not None else {}
        if how is not None and name == node:
            made["reason"] = reason(how, ask, row, decision["remark"])
        made["candidates"].append(
            {
                "node": name,
                "cost": _rounded(cost),
                "terms": {term: _rounded(value) for term, value in terms.items()},
                "notes": notes,
                "features": features,
            }
        )
    if "unseen" in decision:
        made["unseen"] = decision["unseen"]
    return made


def _rounded(value: float | None) -> float | None:
    """To millionths; what is missing or infinite is None."""
    return round(value, 6) if value is not None and isfinite(value) else None
