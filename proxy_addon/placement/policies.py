"""Which node serves a request: who may, what each would cost by the policy, and the cheapest of them.

Candidates are worked out best bound first (branch and bound): a policy gives a quick value that no cost is
below, and once the best cost found is below the next bound nobody after it can win. Fleets of up to ``WHOLE``
nodes are worked out in full all the same, so that a decision can be explained in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop
from types import MappingProxyType

from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.diversion import IN_DOUBT, Wanted, contenders, may_doubt
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.finish_time import FinishTime
from proxy_addon.placement.rules import NO_RULES, Rules
from proxy_addon.placement.scene import Place, Policy, Scene
from proxy_addon.placement.seed_score import SeedScore
from proxy_addon.placement.simple import LeastLoaded, RoundRobin
from proxy_addon.placement.survey import features
from proxy_addon.placement.view import WHOLE, View, look, renewed, stands, unable

POLICIES: dict[str, Policy] = {
    "finish_time": FinishTime(),
    "score": SeedScore(),
    "least_loaded": LeastLoaded(),
    "round_robin": RoundRobin(),
}
HIGH = 0.9  #: the share of answers that are not longer than ``AskFeatures.output_tokens_high``
NO_EXCLUSIONS: Mapping[str, str] = MappingProxyType({})
TOO_GOOD = "has more GPU memory than embeddings are given while another node can serve them"


def choose(policy: str, ask: AskFeatures, rows: Sequence[Features]) -> int:
    """The index of the row that wins; equally good nodes take turns.

    Raises KeyError for an unknown policy, ValueError without rows.
    """
    if not rows:
        raise ValueError("nobody to choose from")
    cost = POLICIES[policy].cost
    return _cheapest([cost(ask, row) for row in rows], rows)


def _cheapest(costs: Sequence[float], rows: Sequence[Features]) -> int:
    lowest, chosen = float("inf"), 0
    for index, found in enumerate(costs):
        if found < lowest or (found == lowest and rows[index].turn < rows[chosen].turn):
            lowest, chosen = found, index
    return chosen


def decide(
    ask: Ask,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    policy: str = "finish_time",
    excluded: Mapping[str, str] = NO_EXCLUSIONS,
    rules: Rules = NO_RULES,
) -> Decision:
    """Where ``ask`` goes.

    ``excluded`` has the nodes that were tried already, by name, and why they are out; ``rules`` says what is
    a coordinator's besides what no other node holds, and who should do what. The decision's ``node`` is None
    where nobody may serve the request; ``Fleet.nobody_stores`` tells whether the model exists at all.
    Equally good nodes take turns. Where nobody may for want of memory that is only guessed at, whoever would
    be best is tried all the same (diversion.py). Raises KeyError for an unknown policy.
    """
    how = POLICIES[policy]
    view = look(ask.key, fleet, speeds, now_s)
    decision = _among(view, ask, fleet, speeds, now_s, policy, how, excluded, rules)
    if decision.node is None and view.kept:
        view.second_s = -1.0  # before giving up, everybody is looked at again
        view = look(ask.key, fleet, speeds, now_s)
        decision = _among(view, ask, fleet, speeds, now_s, policy, how, excluded, rules)
    if decision.node is None and view.holders:
        wanted = Wanted(ask, view.shape(fleet), view.sizes(speeds))
        if may_doubt(view.holders.values(), wanted, now_s, rules):
            tried = _among(view, ask, fleet, speeds, now_s, policy, how, excluded, rules, in_doubt=True)
            return tried if tried.node is not None else decision
    return decision


class _Search:
    """Works out the features of places, as far as they may win."""

    def __init__(
        self, scene: Scene, view: View, fleet: Fleet, how: Policy, excluded: Mapping[str, str]
    ) -> None:
        self.scene = scene
        self.view = view
        self.fleet = fleet
        self.how = how
        self.excluded = excluded
        self.rows: list[Features] = []
        self.out = list(view.able.out)
        self.left = 0  #: places that cannot win and were not worked out

    def all_of(self, places: list[Place]) -> None:
        """Work out every one of ``places``, of whom was seen just now that they are able."""
        scene, rows, out, excluded = self.scene, self.rows, self.out, self.excluded
        for place in places:
            why = excluded.get(place.name) if excluded else None
            if why is None:
                row = features(scene, place)
                if not isinstance(row, str):
                    rows.append(row)
                    continue
                why = row
            out.append((place.name, why))

    def best_of(self, places: list[Place]) -> None:
        """Work out those of ``places`` that may win, the most promising first."""
        scene, how = self.scene, self.how
        queue = [
            (bound, place.node.turn, index)
            for index, (bound, place) in enumerate(zip(how.bounds(scene, places), places, strict=True))
        ]
        heapify(queue)
        best = min(
            ((how.cost(scene.features, row), row.turn, -1) for row in self.rows),
            default=(float("inf"), 0, 0),
        )
        found: list[tuple[int, Features]] = []
        while queue and queue[0] < best:
            _, turn, index = heappop(queue)
            row = self._as_it_is(places, index)
            if row is not None:
                found.append((index, row))
                best = min(best, (how.cost(scene.features, row), turn, index))
        self.rows += [row for _, row in sorted(found, key=lambda each: each[0])]
        self.left += len(queue)

    def _as_it_is(self, places: list[Place], index: int) -> Features | None:
        """The features of one of ``places``, of which a while ago all was well."""
        place = places[index]
        name, node, key = place.name, place.node, self.view.key
        why: Features | str | None = self.excluded.get(name)
        if why is None:
            here = self.fleet.nodes.get(name) is node
            why = unable(node, key, self.scene.now_s) if here else "left the fleet"
        if why is None:
            if node.models[key] is not place.row or not stands(place, key, self.scene.speeds):
                place = self.view.holders[name] = places[index] = renewed(place, key, self.scene.speeds)
            why = features(self.scene, place)
        if isinstance(why, str):
            self.out.append((name, why))
            return None
        return why


def _among(
    view: View,
    ask: Ask,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    policy: str,
    how: Policy,
    excluded: Mapping[str, str],
    rules: Rules,
    in_doubt: bool = False,
) -> Decision:
    """The best of ``view``."""
    able, shape, seen = view.able, view.shape(fleet), view.sizes(speeds)
    embeds = ask.task is Task.EMBED
    lengths = speeds.output(ask)
    asked = AskFeatures(
        0.0 if ask.load_only else speeds.prompt_tokens(ask),
        lengths.mean,
        max(lengths.quantile(HIGH), lengths.mean),
        ask.priority,
        "embedding" if embeds else ask.kind,
        ask.complexity,
        ask.requires_gpu,
        view.best_s_per_output_token,
        rules.specialise_factor,
    )
    slots = 1 if embeds else None
    wanted = ask.reload_key, ask.num_ctx, ask.usual, slots, in_doubt
    scene = Scene(ask, asked, speeds, now_s, view.second_s, slots, shape, seen, wanted, in_doubt)
    search = _Search(scene, view, fleet, how, excluded)
    places = able.places
    awaits, diverted = tuple(able.awaited), ""
    if in_doubt:
        places, diverted = [*places, *able.coordinators], IN_DOUBT
    elif able.coordinators or awaits or ask.key in rules.models:
        found = contenders(able, Wanted(ask, shape, seen), fleet, speeds, now_s, excluded, rules)
        places, awaits, diverted = found.places, found.awaited, found.why
        search.out += found.out
    _search(search, places, rules, rules.embeddings_max_vram_bytes)
    if not search.rows:
        why = _nobody(ask, fleet, search.out)
        return Decision.by(policy, how, asked, (), (), None, search.out, why, awaits)
    remark = f"; {diverted}" if diverted else ""
    if search.left:
        remark += f"; {search.left} more nodes cannot be better"
    rows = search.rows
    costs = [how.cost(asked, row) for row in rows]
    chosen = _cheapest(costs, rows)
    return Decision.by(policy, how, asked, rows, costs, chosen, search.out, remark, left=search.left)


def _search(search: _Search, places: list[Place], rules: Rules, limit_bytes: int | None) -> None:
    """Work out ``places``, those first whom others should leave the work to."""
    scene = search.scene
    work_out = search.all_of if len(search.fleet.nodes) <= WHOLE else search.best_of
    if limit_bytes is not None and scene.features.kind == "embedding":
        small = [place for place in places if place.machine.gpu_total_bytes <= limit_bytes]
        large = [place for place in places if place.machine.gpu_total_bytes > limit_bytes]
        _search(search, small, rules, None)
        if search.rows:
            search.out += [(place.name, TOO_GOOD) for place in large]
            return
        places = large
    if meant := rules.specialise.get(scene.features.kind):
        work_out([place for place in places if place.name in meant])
        scene.outside = bool(search.rows)
        places = [place for place in places if place.name not in meant]
    work_out(places)


def _nobody(ask: Ask, fleet: Fleet, out: Sequence[tuple[str, str]]) -> str:
    """Why nobody may serve ``ask``, in a sentence."""
    if not fleet.nodes:
        return "the fleet has no nodes"
    holders = [
        (name, why) for name, why in out if name in fleet.nodes and ask.key in fleet.nodes[name].models
    ]
    if not holders:
        return f"no node has the model {ask.model!r}"
    return "no node may serve it: " + "; ".join(f"{name} {why}" for name, why in holders[:8])
