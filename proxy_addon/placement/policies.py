"""Which node serves a request: who may, what each would cost by the policy, and the cheapest of them.

Candidates are worked out best bound first (branch and bound): a policy gives a quick value that no cost is
below, and once the best cost found is not above the next bound nobody after it can win. Fleets of up to
``WHOLE`` places are worked out in full all the same, so that a decision can be explained in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from heapq import heapify, heappop
from types import MappingProxyType

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.placement.finish_time import FinishTime
from proxy_addon.placement.memory import shape_of
from proxy_addon.placement.runner import slots_of, start
from proxy_addon.placement.scene import Cost, Place, Policy, Scene
from proxy_addon.placement.seed_score import SeedScore
from proxy_addon.placement.simple import LeastLoaded, RoundRobin

POLICIES: dict[str, Policy] = {
    "finish_time": FinishTime(),
    "score": SeedScore(),
    "least_loaded": LeastLoaded(),
    "round_robin": RoundRobin(),
}
WHOLE = 32
NO_EXCLUSIONS: Mapping[str, str] = MappingProxyType({})


def decide(
    ask: Ask,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    policy: str = "finish_time",
    excluded: Mapping[str, str] = NO_EXCLUSIONS,
) -> Decision:
    """Where ``ask`` goes.

    ``excluded`` has the nodes that were tried already, by name, and why they are out. The decision's ``node``
    is None where nobody may serve the request; ``Fleet.nobody_stores`` tells whether the model exists at all.
    Equally good nodes take turns. Raises KeyError for an unknown policy.
    """
    judge = POLICIES[policy]
    places, candidates = _places(ask, fleet, now_s, excluded)
    if not places:
        return Decision(policy, None, tuple(candidates), _nobody(ask, fleet, candidates))
    row = places[0].row
    info = fleet.shapes.get(row.digest)
    scene = Scene(
        ask,
        speeds,
        now_s,
        places,
        shape_of(info, row.size) if info else None,
        0.0 if ask.load_only else speeds.prompt_tokens(ask),
        speeds.output_tokens(ask),
        speeds.size_ratio(ask.key),
    )
    queue = [
        (bound, len(place.node.flights), place.node.turn, index)
        for index, (bound, place) in enumerate(zip(judge.bounds(scene), places, strict=True))
    ]
    heapify(queue)
    whole = len(places) <= WHOLE
    best: tuple[float, int, int, int] | None = None
    best_cost: Cost | None = None
    while queue and (whole or best is None or queue[0] < best):
        _, in_flight, turn, index = heappop(queue)
        place = places[index]
        slots = slots_of(place.node, ask, place.row)
        how = start(place.node, ask, place.row, scene.shape, scene.size_ratio, slots)
        if isinstance(how, str):
            candidates.append(Candidate(place.name, excluded=how))
            continue
        cost = judge.cost(scene, place, how, slots)
        candidates.append(Candidate(place.name, None, cost.value, cost.terms, cost.notes))
        rank = (cost.value, in_flight, turn, index)
        if best is None or rank < best:
            best, best_cost = rank, cost
    if best is None or best_cost is None:
        return Decision(policy, None, tuple(candidates), _nobody(ask, fleet, candidates))
    name = places[best[3]].name
    reason = f"{name} {judge.explain(best_cost)}"
    if queue:
        reason += f"; {len(queue)} more nodes cannot be better"
    return Decision(policy, name, tuple(candidates), reason)


def _places(
    ask: Ask, fleet: Fleet, now_s: float, excluded: Mapping[str, str]
) -> tuple[list[Place], list[Candidate]]:
    """Who may be considered, and who may not, each with the reason."""
    key, digest = ask.key, fleet.digest(ask.key)
    places: list[Place] = []
    out: list[Candidate] = []
    for name, node in fleet.nodes.items():
        row = node.models.get(key)
        if row is None:
            why: str | None = "does not have the model"
        elif name in excluded:
            why = excluded[name]
        elif row.digest != digest:
            why = "has another version of the model"
        else:
            why = _unable(node, key, now_s)
        if why is None and row is not None:
            places.append(Place(name, node, row))
        else:
            out.append(_out(name, why or ""))
    return places, out


def _unable(node: Node, key: str, now_s: float) -> str | None:
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
    return None


@lru_cache(maxsize=8192)
def _out(name: str, why: str) -> Candidate:
    return Candidate(name, excluded=why)


def _nobody(ask: Ask, fleet: Fleet, candidates: list[Candidate]) -> str:
    """Why nobody may serve ``ask``, in a sentence."""
    if not fleet.nodes:
        return "the fleet has no nodes"
    holders = [c for c in candidates if c.node in fleet.nodes and ask.key in fleet.nodes[c.node].models]
    if not holders:
        return f"no node has the model {ask.model!r}"
    return "no node may serve it: " + "; ".join(f"{c.node} {c.excluded}" for c in holders[:8])
