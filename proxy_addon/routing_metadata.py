"""``routing_metadata: body``: the final object of an answer says where it was made and why.

The keys are the seed's (``_sollol_routing`` with host, task_type, complexity, decision_score,
actual_duration_ms, queue_wait_ms) and a few of our own. Only whole answers and native streams have a final
object that clients read as a whole; other streams carry the same facts in their headers alone.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from proxy_addon.record import Record

_FINAL = re.compile(rb'"done"\s*:\s*true')
#: The seed's bounds (``_estimate_complexity``), prompt tokens.
_COMPLEXITY = ((100, "simple"), (500, "medium"))


def routing(rec: Record, now_s: float) -> dict[str, Any]:
    """What ``_sollol_routing`` holds; times in milliseconds as the seed has them."""
    decision = rec.decisions[-1] if rec.decisions else None
    chosen = decision.chosen if decision else None
    tokens = rec.ask.prompt_tokens if rec.ask else 0
    return {
        "host": rec.attempts[-1].node if rec.attempts else None,
        "request_id": rec.id,
        "task_type": rec.ask.task.value if rec.ask else None,
        "complexity": next((name for limit, name in _COMPLEXITY if tokens < limit), "complex"),
        "policy": decision.policy if decision else None,
        "decision_score": _score(decision.policy, chosen.cost) if decision and chosen else None,
        "expected_duration_ms": round(decision.expected_s * 1e3, 1) if decision else None,
        "actual_duration_ms": round((now_s - rec.started_s) * 1e3, 1),
        "queue_wait_ms": round(((rec.sent_s or now_s) - rec.started_s) * 1e3, 1),
        "attempts": len(rec.attempts),
    }


def _score(policy: str, cost: float) -> float:
    """A score where more is better, whatever the policy minimises: the seed's own, else the cost negated."""
    return round(-cost, 4) if policy != "finish_time" else round(1.0 / cost, 4) if cost > 0 else 0.0


def add(data: bytes, rec: Record, now_s: float) -> bytes:
    """``data`` with ``_sollol_routing`` in its last object; as it was if that does not end ``data``."""
    end = data.rstrip()
    if not end.endswith(b"}"):
        return data
    field = b',"_sollol_routing":' + orjson.dumps(routing(rec, now_s))
    return end[:-1] + field + b"}" + data[len(end) :]


def is_final(data: bytes) -> bool:
    """Whether ``data``, whole lines of a native stream, has the final object in it."""
    return _FINAL.search(data) is not None
