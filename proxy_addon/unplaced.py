"""A request that nobody may serve now: whether to wait, for how long, and what is said in the end."""

from __future__ import annotations

from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.health import BASE_EJECTION_S
from proxy_addon.fleet.node import Fleet, names
from proxy_addon.one_server.upstream import nobody
from proxy_addon.placement.decision import Decision
from proxy_addon.record import Record

MANY_EXCLUDED = 6  #: an error sentence names so many nodes, the journal has them all
LONGEST_EJECTION_S = 2 * BASE_EJECTION_S  #: that is waited for: the second one in a row is


def awaits(rec: Record, decision: Decision, now_s: float, wait_s: float) -> bool:
    """Whether it is worth to wait on for a coordinator; ``wait_s`` run from the first such moment."""
    if not any(name not in rec.hopeless for name in decision.awaits):
        return False
    if rec.awaits_until_s is None:
        rec.awaits_until_s = now_s + wait_s
    return now_s < rec.awaits_until_s


def comes_back(rec: Record, fleet: Fleet, now_s: float, max_wait_s: float) -> bool:
    """Whether a node is only kept from taking ``rec`` by how few it is given while it comes back."""
    assert rec.ask is not None and rec.waiter is not None
    key = rec.ask.key
    return now_s - rec.waiter.arrived_s < max_wait_s and any(
        node.up(now_s)
        and key in node.models
        and node.name not in rec.hopeless
        and not node.health.admits(node.own_flights)
        for node in fleet
    )


def until_one_returns_s(rec: Record, fleet: Fleet, now_s: float) -> float:
    """How long to wait on for an ejection to end: rounds that nobody can be tried in show nothing.

    Only for a node that answers its polls and whose failures do not go on and on.
    """
    assert rec.ask is not None
    key = rec.ask.key
    able = [
        node
        for node in fleet
        if key in node.models and node.poll_error is None and node.name not in rec.hopeless
    ]
    left_s = min((node.health.ejected_until_s - now_s for node in able), default=0.0)
    return left_s if left_s <= LONGEST_EJECTION_S else 0.0


def hopeless(rec: Record, fleet: Fleet, now_s: float) -> bool:
    """Whether another round could only repeat what this one has shown."""
    assert rec.ask is not None
    live = fleet.holders(rec.ask.key, now_s)
    return bool(live) and all(node.name in rec.hopeless for node in live)


def why(rec: Record, decision: Decision, fleet: Fleet, now_s: float) -> str:
    """What keeps each node from serving ``rec``; first those that have tried: what is wrong there matters."""
    if not fleet.up(now_s):
        return nobody(fleet)
    tried = {attempt.node for attempt in rec.attempts}
    out = sorted(decision.candidates, key=lambda each: each.node not in tried)
    excluded = [f"{each.node}: {each.excluded}" for each in out if each.excluded]
    if not excluded:
        return f"no node can serve this request ({names(fleet)}): {decision.reason}"
    more = f"; and {len(excluded) - MANY_EXCLUDED} more" if len(excluded) > MANY_EXCLUDED else ""
    return "no node can serve this request: " + "; ".join(excluded[:MANY_EXCLUDED]) + more


def not_found(ask: Ask) -> str:
    """Ollama's own words (``server/routes.go``), which clients match; they differ between endpoints."""
    if ask.task is Task.EMBED:
        return f'model "{ask.model}" not found, try pulling it first'
    return f"model '{ask.model}' not found"
