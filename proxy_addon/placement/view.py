"""Who may be considered for a model, whatever the policy: up, healthy, holding the right digest.

What is worked out of a node for a model is kept between decisions, and with it every object that it was made
from (:class:`Place`): a place holds as long as these are still the node's own, which is quickly seen. Nothing
needs to be told of a change, and nothing waits for one. Only in large fleets, of which even a glance at each
node takes too long, who is considered is found out once a second; whoever is then worked out is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.memory import NOTHING_SEEN, ModelShape, shape_of
from proxy_addon.placement.runner import slots_for
from proxy_addon.placement.scene import Place

WHOLE = 32  #: a fleet of up to so many nodes is looked at in full for every decision
OTHER_VERSION = "has another version of the model"
MISSING = "does not have the model"


@dataclass(slots=True)
class Able:
    """Of those who have a model, who could be sent a request for it now, and why the others could not."""

    places: list[Place] = field(default_factory=list)
    coordinators: list[Place] = field(default_factory=list)  #: apart: see diversion.py
    awaited: list[str] = field(default_factory=list)  #: coordinators that could serve it, but not now
    out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class View:
    """The fleet as seen from one model."""

    key: str
    holders: dict[str, Place]  #: who has it, in whichever version
    others: dict[str, Node]
    missing: list[tuple[str, str]]  #: the others' names, each with the reason
    best_s_per_output_token: float = 0.0
    second_s: float = -1.0  #: the whole second in which all were looked at last
    kept: bool = False  #: the last look was no more than a glance at this
    able: Able = field(default_factory=Able)
    seen: Mapping[int, float] = NOTHING_SEEN
    _shape: tuple[dict[str, Any], int, ModelShape | None] | None = None

    def shape(self, fleet: Fleet) -> ModelShape | None:
        """The model's, where ``/api/show`` has told it."""
        place = next((place for place in self.holders.values() if not place.other_version), None)
        info = fleet.shapes.get(place.row.digest) if place is not None else None
        if place is None or not info:
            return None
        known = self._shape
        if known is None or known[0] is not info or known[1] != place.row.size:
            known = self._shape = info, place.row.size, shape_of(info, place.row.size)
        return known[2]

    def sizes(self, speeds: Speeds) -> Mapping[int, float]:
        """What the model was seen to take: the same object as long as it says the same."""
        seen = speeds.sizes(self.key)
        if seen != self.seen:
            self.seen = seen
        return self.seen


def look(key: str, fleet: Fleet, speeds: Speeds, now_s: float) -> View:
    """The fleet as seen from the model ``key``, brought up to date."""
    view, second_s = fleet.views.get(key), float(now_s // 1)
    large = len(fleet.nodes) > WHOLE
    if view is not None and len(fleet.nodes) == len(view.holders) + len(view.others):
        if large and view.second_s == second_s:
            view.kept = True
            return view
        if not _renewed(view, fleet, speeds):
            view = None
    else:
        view = None
    if view is None:
        view = _made(key, fleet, speeds)
        if view.holders:
            fleet.views[key] = view
        else:  # clients ask for whatever they like
            fleet.views.pop(key, None)
    view.second_s, view.kept = second_s, False
    view.able = who(view, now_s)
    if large:
        for place in view.holders.values():
            place.success_rate_at(second_s, speeds)
    return view


def who(view: View, now_s: float) -> Able:
    """Those of ``view`` who could be sent a request."""
    able, key = Able(out=view.missing.copy()), view.key
    for name, place in view.holders.items():
        # Where nobody answers the fleet serves no version, and that nobody answers is what matters.
        why = OTHER_VERSION if place.other_version else unable(place.node, key, now_s)
        if why is None:
            (able.coordinators if place.coordinator else able.places).append(place)
            continue
        able.out.append((name, why))
        if place.coordinator and not place.other_version:
            able.awaited.append(name)
    return able


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
    if health.allowance is not None and not health.admits(node.own_flights):
        return f"is coming back and has its {health.allowance} in flight"
    if now_s < node.full_until_s:
        return "said that it is full"
    if node.unfit_until_s and now_s < node.unfit_until_s.get(key, 0.0):
        return "was out of memory with this model"
    if key not in node.models:
        return MISSING
    return None


def stands(place: Place, key: str, speeds: Speeds) -> bool:
    """Whether ``place`` is still what its node says and what was learned of it."""
    node = place.node
    return (
        node.report is place.report
        and node.resident.get(key) is place.resident
        and node.parallel == place.parallel
        and speeds.stamp(place.name) == place.stamp
    )


def renewed(place: Place, key: str, speeds: Speeds) -> Place:
    """``place`` as its node is now: itself, where only the node's report is another and says little new."""
    node, name, report = place.node, place.name, place.node.report
    if (
        node.models[key] is place.row
        and node.resident.get(key) is place.resident
        and node.parallel == place.parallel
        and speeds.stamp(name) == place.stamp
    ):
        machine = speeds.machine(name, report)
        estimate = speeds.estimate(name, machine, key, place.row.size)
        if estimate is place.estimate and node.coordinator is place.coordinator:
            if machine.room != place.room:
                place.starts = None
            elif place.starts is not None:
                place.starts.row = None
            place.report, place.machine = report, machine
            return place
    return placed(name, node, key, speeds, place.other_version)


def placed(name: str, node: Node, key: str, speeds: Speeds, other_version: bool = False) -> Place:
    """What of ``node``, which has the model ``key``, does not change from one request to the next."""
    row, report, resident = node.models[key], node.report, node.resident.get(key)
    machine = speeds.machine(name, report)
    estimate = speeds.estimate(name, machine, key, row.size)
    return Place(
        name,
        node,
        row,
        resident,
        report,
        node.parallel,
        speeds.stamp(name),
        node.poll_error is None,
        node.coordinator,
        slots_for(node.parallel, row),
        machine,
        estimate,
        1 / estimate.prefill_tok_s,
        1 / estimate.decode_tok_s,
        0.0 if resident is not None else estimate.load_s,
        speeds.lost_s(name),
        other_version,
    )


def _made(key: str, fleet: Fleet, speeds: Speeds) -> View:
    digest = fleet.digest(key)
    view = View(key, {}, {}, [])
    for name, node in fleet.nodes.items():
        row = node.models.get(key)
        if row is None:
            view.others[name] = node
            view.missing.append((name, MISSING))
        else:
            view.holders[name] = placed(name, node, key, speeds, digest not in (None, row.digest))
    _compare(view)
    return view


def _renewed(view: View, fleet: Fleet, speeds: Speeds) -> bool:
    """Bring ``view`` up to date; False where other nodes have the model now, or in another version."""
    key, nodes, changed = view.key, fleet.nodes, False
    for name, node in view.others.items():
        if nodes.get(name) is not node or key in node.models:
            return False
    for name, place in view.holders.items():
        node = place.node
        if (
            nodes.get(name) is not node
            or node.models.get(key) is not place.row
            or (node.poll_error is None) is not place.answers
        ):
            return False
        if not stands(place, key, speeds):
            view.holders[name] = new = renewed(place, key, speeds)
            changed = changed or new is not place
    if changed:
        _compare(view)
    return True


def _compare(view: View) -> None:
    view.best_s_per_output_token = min(
        (place.s_per_output_token for place in view.holders.values()), default=0.0
    )
