"""Who may be considered for a model, whatever the policy: up, healthy, holding the right digest."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.runner import slots_of
from proxy_addon.placement.scene import Place


@dataclass(slots=True)
class View:
    """The fleet as seen from one model at ``at_s``."""

    at_s: float
    nodes: int  #: how many nodes the fleet had
    places: list[Place]
    out: list[Candidate]  #: the others, each with the reason
    coordinators: list[Place] = field(default_factory=list)  #: apart from ``places``: see diversion.py
    awaited: list[str] = field(default_factory=list)  #: coordinators that have it, but are ``out`` for now


def look(ask: Ask, fleet: Fleet, speeds: Speeds, now_s: float) -> View:
    """Who may be considered for the model of ``ask`` now."""
    key, digest = ask.key, fleet.digest(ask.key)
    view = View(now_s, len(fleet.nodes), [], [])
    for name, node in fleet.nodes.items():
        row = node.models.get(key)
        if row is None:
            view.out.append(out(name, "does not have the model"))
            continue
        # Where nobody answers the fleet serves no version, and that nobody answers is what matters.
        why = "has another version of the model" if digest not in (None, row.digest) else None
        if why is None and (why := unable(node, key, now_s)) is not None and node.coordinator:
            view.awaited.append(name)
        if why is not None:
            view.out.append(out(name, why))
            continue
        machine = speeds.machine(name, node.report)
        estimate = speeds.estimate(name, machine, key, row.size)
        load_s = 0.0 if key in node.resident else estimate.load_s
        slots = slots_of(node, ask, row)
        (view.coordinators if node.coordinator else view.places).append(
            Place(
                name,
                node,
                row,
                slots,
                machine.room,
                estimate,
                1 / estimate.prefill_tok_s,
                1 / estimate.decode_tok_s,
                load_s,
                estimate.prior,
            )
        )
    return view


def unable(node: Node, key: str, now_s: float) -> str | None:
    """Why ``node`` may not be sent a request for ``key`` now."""
    health = node.health
    if node.poll_error is not None:
        return f"is down: {node.poll_error}"
    if node.polled_s is None:
        return "was not reached yet"
    if node.leaving:
        return "is leaving the fleet"
    if now_s < health.ejected_until_s:
        why = f": {health.reason}" if health.reason else ""
        return f"is ejected for {health.ejected_until_s - now_s:.1f} s{why}"
    if health.allowance is not None and not health.admits(len(node.flights)):
        return f"is coming back and has its {health.allowance} in flight"
    if now_s < node.full_until_s:
        return "said that it is full"
    if node.unfit_until_s and now_s < node.unfit_until_s.get(key, 0.0):
        return "was out of memory with this model"
    if key not in node.models:
        return "does not have the model"
    return None


@lru_cache(maxsize=8192)
def out(name: str, why: str) -> Candidate:
    """The candidate ``name`` that may not serve."""
    return Candidate(name, excluded=why)
