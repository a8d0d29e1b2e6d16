"""Which node serves a request: who may, what each would cost by the policy, and the cheapest of them.

Candidates are worked out best bound first (branch and bound): a policy gives a quick value that no cost is
below, and once the best cost found is below the next bound nobody after it can win. Fleets of up to ``WHOLE``
nodes are worked out in full all the same, so that a decision can be explained in full. In larger ones, who
may be considered (view.py) is remembered for ``VIEW_S``; whoever is then worked out is judged as he is now.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop
from types import MappingProxyType

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.placement.diversion import Diversion, Wanted, contenders
from proxy_addon.placement.finish_time import FinishTime
from proxy_addon.placement.memory import shape_of
from proxy_addon.placement.runner import start
from proxy_addon.placement.scene import Policy, Scene
from proxy_addon.placement.seed_score import SeedScore
from proxy_addon.placement.simple import LeastLoaded, RoundRobin
from proxy_addon.placement.view import View, look, out, unable

POLICIES: dict[str, Policy] = {
    "finish_time": FinishTime(),
    "score": SeedScore(),
    "least_loaded": LeastLoaded(),
    "round_robin": RoundRobin(),
}
WHOLE = 32
VIEW_S = 1.0  #: about the interval of the polls that bring what a view is made of
NO_EXCLUSIONS: Mapping[str, str] = MappingProxyType({})
NO_RULES = Diversion()


def decide(
    ask: Ask,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    policy: str = "finish_time",
    excluded: Mapping[str, str] = NO_EXCLUSIONS,
    rules: Diversion = NO_RULES,
) -> Decision:
    """Where ``ask`` goes.

    ``excluded`` has the nodes that were tried already, by name, and why they are out; ``rules`` says what is
    a coordinator's besides what no other node holds. The decision's ``node`` is None where nobody may serve
    the request; ``Fleet.nobody_stores`` tells whether the model exists at all.
    Equally good nodes take turns. Raises KeyError for an unknown policy.
    """
    how = POLICIES[policy]
    if len(fleet.nodes) > WHOLE:
        view = fleet.views.get(ask.key)
        if view is not None and 0 <= now_s - view.at_s < VIEW_S and view.nodes == len(fleet.nodes):
            decision = _among(view, ask, fleet, speeds, now_s, policy, how, excluded, rules)
            if decision.node is not None:
                return decision
        view = fleet.views[ask.key] = look(ask, fleet, speeds, now_s)
    else:
        view = look(ask, fleet, speeds, now_s)
    return _among(view, ask, fleet, speeds, now_s, policy, how, excluded, rules)


def _among(
    view: View,
    ask: Ask,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    policy: str,
    how: Policy,
    excluded: Mapping[str, str],
    rules: Diversion,
) -> Decision:
    """The best of ``view``."""
    candidates = list(view.out)
    places, awaits, diverted = view.places, tuple(view.awaited), ""
    if not places and not view.coordinators:
        return Decision(policy, None, tuple(candidates), _nobody(ask, fleet, candidates), awaits)
    row = (places or view.coordinators)[0].row
    info = fleet.shapes.get(row.digest)
    shape = shape_of(info, row.size) if info else None
    seen = speeds.sizes(ask.key)
    if view.coordinators or awaits or ask.key in rules.models:
        found = contenders(view, Wanted(ask, shape, seen), fleet, speeds, now_s, excluded, rules)
        places, awaits, diverted = found.places, found.awaited, found.why
        candidates += found.out
    prompt_tokens = 0.0 if ask.load_only else speeds.prompt_tokens(ask)
    scene = Scene(ask, speeds, now_s, places, prompt_tokens, speeds.output_tokens(ask))
    queue = [
        (bound, place.node.turn, index)
        for index, (bound, place) in enumerate(zip(how.bounds(scene), places, strict=True))
    ]
    heapify(queue)
    whole = len(places) <= WHOLE
    best: tuple[float, int, int] | None = None
    chosen: Candidate | None = None
    while queue and (whole or best is None or queue[0] < best):
        _, turn, index = heappop(queue)
        place = places[index]
        name, node = place.name, place.node
        why = excluded.get(name)
        if why is None and view.at_s != now_s:
            why = unable(node, ask.key, now_s) if fleet.nodes.get(name) is node else "left the fleet"
        if why is not None:
            candidates.append(out(name, why))
            continue
        begin = start(node, ask, place.row, place.room, place.slots, shape, seen, place.sharded)
        if isinstance(begin, str):
            candidates.append(Candidate(name, excluded=begin))
            continue
        candidate = how.judge(scene, place, begin)
        candidates.append(candidate)
        rank = (candidate.cost, turn, index)
        if best is None or rank < best:
            best, chosen = rank, candidate
    if chosen is None:
        return Decision(policy, None, tuple(candidates), _nobody(ask, fleet, candidates), awaits)
    reason = f"{chosen.node} {how.explain(chosen)}"
    if diverted:
        reason += f"; {diverted}"
    if queue:
        reason += f"; {len(queue)} more nodes cannot be better"
    return Decision(policy, chosen.node, tuple(candidates), reason)


def _nobody(ask: Ask, fleet: Fleet, candidates: list[Candidate]) -> str:
    """Why nobody may serve ``ask``, in a sentence."""
    if not fleet.nodes:
        return "the fleet has no nodes"
    holders = [c for c in candidates if c.node in fleet.nodes and ask.key in fleet.nodes[c.node].models]
    if not holders:
        return f"no node has the model {ask.model!r}"
    return "no node may serve it: " + "; ".join(f"{c.node} {c.excluded}" for c in holders[:8])
