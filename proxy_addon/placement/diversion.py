"""Is a model a coordinator's? Only where no ordinary node holds it, or where configuration says so.

A node holds a model that it has and that fits it, after what may be unloaded; that it is busy, full or coming
back changes nothing. One that is down, that this very request failed on, or that ran out of memory with the
model does not. Without an agent a node is taken to hold what it has, as everywhere in placement.

Where nobody is known to hold it, neither node nor coordinator, the estimate may be at fault: which context a
node gives to a request that names none (OLLAMA_CONTEXT_LENGTH) it shows only once something is in its memory.
Whoever is out by an assumed context alone is then tried, and its own answer decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.memory import ModelShape
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.runner import slots_of, start
from proxy_addon.placement.scene import Place
from proxy_addon.placement.view import Able, unable

NO_NODE_HOLDS_IT = "no other node holds the model"
SET_SO = "the model is set to be sharded"
IN_DOUBT = "no node is known to hold the model, but the request names no num_ctx: Ollama itself decides"


@dataclass(frozen=True, slots=True)
class Contenders:
    """Who competes for a request."""

    places: list[Place]
    out: Sequence[tuple[str, str]] = ()  #: who does not, and why
    awaited: tuple[str, ...] = ()  #: coordinators that could serve it, but not now
    why: str = ""  #: why it is diverted; empty where it is not


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked, and all that is known of its size."""

    ask: Ask
    shape: ModelShape | None
    seen: Mapping[int, float]


def contenders(
    able: Able,
    wanted: Wanted,
    fleet: Fleet,
    speeds: Speeds,
    now_s: float,
    excluded: Mapping[str, str],
    rules: Rules,
) -> Contenders:
    """Ordinary nodes where one of them holds the model, else coordinators.

    Where no coordinator can take it either, a node that only has too little of it on its GPUs still may.
    """
    key = wanted.ask.key
    digest, set_so = fleet.digest(key), key in rules.models
    lacking: dict[str, str] = {}
    for name, node in fleet.nodes.items():
        row = node.models.get(key)
        if row is None or row.digest != digest or node.coordinator:
            continue
        lacks = SET_SO if set_so else _lacks(name, node, wanted, speeds, now_s, excluded, rules)
        if lacks is None:
            taken = f"takes only what no other node holds; {name} does"
            return Contenders(able.places, [(place.name, taken) for place in able.coordinators])
        lacking[name] = lacks
    too_thin = any(lacks.startswith(_THIN) for lacks in lacking.values())
    if too_thin and not any(_able(place, wanted, now_s, excluded) for place in able.coordinators):
        return Contenders([*able.places, *able.coordinators])
    awaited = [
        place.name
        for place in able.coordinators
        if place.name in excluded or unable(place.node, key, now_s) is not None
    ]
    return Contenders(
        able.coordinators,
        [(place.name, lacking.get(place.name, "left the fleet")) for place in able.places],
        (*able.awaited, *awaited),
        SET_SO if set_so else NO_NODE_HOLDS_IT,
    )


def may_doubt(places: Iterable[Place], wanted: Wanted, now_s: float, rules: Rules) -> bool:
    """Whether a node may be tried that the model seems not to fit, of all ``places`` that have it.

    Never for a context that is named; nor while anybody is up that holds the model, however busy it is and
    whatever it is excluded for: that passes.
    """
    ask = wanted.ask
    if ask.num_ctx is not None or ask.key in rules.models:
        return False
    return not any(
        not place.other_version
        and place.node.up(now_s)
        and now_s >= place.node.unfit_until_s.get(ask.key, 0.0)
        and _starts(place, wanted)
        for place in places
    )


_THIN = "would have only "


def _lacks(
    name: str,
    node: Node,
    wanted: Wanted,
    speeds: Speeds,
    now_s: float,
    excluded: Mapping[str, str],
    rules: Rules,
) -> str | None:
    """Why ``node``, which has the model on disk, does not hold it; None if it does."""
    key = wanted.ask.key
    unfit = now_s < node.unfit_until_s.get(key, 0.0)
    if unfit or not node.up(now_s):
        return unable(node, key, now_s) or "is down"
    if name in excluded and now_s >= node.full_until_s:
        return excluded[name]
    row, room = node.models[key], speeds.machine(name, node.report).room
    begin = start(node, wanted.ask, row, room, slots_of(node, wanted.ask, row), wanted.shape, wanted.seen)
    if isinstance(begin, str):
        return begin
    share = 0.0 if room is not None and not room.gpus else begin.gpu_share
    if share < rules.min_gpu_share:
        return f"{_THIN}{share:.0%} of it on its GPUs, not {rules.min_gpu_share:.0%}"
    return None


def _able(place: Place, wanted: Wanted, now_s: float, excluded: Mapping[str, str]) -> bool:
    """Whether the coordinator at ``place`` could be given the request now."""
    if place.name in excluded or unable(place.node, wanted.ask.key, now_s) is not None:
        return False
    return _starts(place, wanted)


def _starts(place: Place, wanted: Wanted) -> bool:
    """Whether the model fits the node at ``place``, as far as that can be told."""
    slots = slots_of(place.node, wanted.ask, place.row)
    begin = start(
        place.node, wanted.ask, place.row, place.room, slots, wanted.shape, wanted.seen, place.sharded
    )
    return not isinstance(begin, str)
