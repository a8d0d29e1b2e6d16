"""What befalls the fleet, and when: a pure function of the seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from tests.soak.house import FLEETING, HOUSES, MADE

Kind = Literal["kill", "stop", "pull", "create", "delete", "reload", "restart", "upgrade"]

UP_S = (6.0, 40.0)  #: a node's time between two faults
#: How long a killed node stays away. 0: it is back before a poll can miss it, with nothing loaded.
AWAY_S = (0.0, 1.0, 4.0, 10.0)
#: How long a stopped node stays so: below and above what polls tolerate (about 4 s), and what a silent stream
#: of a lost node is given (10 s more).
STOPPED_S = (0.4, 2.0, 6.0, 18.0)
MODEL_PAUSE_S = (2.0, 25.0)  #: between two of these; many last longer than ``GRACE_S``
THROUGH_SHARE = 0.7  #: of lives that begin through the proxy; among them
ANYWHERE_SHARE = 0.25  #: are those of all whose pull leaves it to the proxy where to
#: What befalls a model, and whether the proxy is asked to do it.
COMMON_LIFE: tuple[tuple[Kind, bool], ...] = (("pull", True), ("delete", False), ("delete", True))
LONE_LIFE: tuple[tuple[Kind, bool], ...] = (("pull", False), ("delete", False))
MADE_LIFE: tuple[tuple[Kind, bool], ...] = (("create", True), ("delete", True))
RELOAD_PAUSE_S = (8.0, 25.0)
RENEWAL_PAUSE_S = (25.0, 90.0)  #: between two restarts or upgrades of the proxy

#: What a changed configuration says, in this order again and again. "broken" must be refused.
RELOADS = ("without", "whole", "broken", "limits")


@dataclass(frozen=True, order=True)
class Event:
    """One thing that happens; ``node`` is an index into ``HOUSES``."""

    at_s: float
    kind: Kind
    node: int = -1
    model: str = ""
    for_s: float = 0.0
    through_proxy: bool = False
    variant: str = ""  #: of a reload, see below; of a pull "anywhere", if it names no node


def schedule(
    seed: str, length_s: float, *, renewals: bool, reloads: bool = True, upgrades: bool = True
) -> list[Event]:
    """All events of ``length_s``, in order. Every fault ends within it. ``renewals`` are of the proxy."""
    events: list[Event] = []
    for node in range(len(HOUSES)):
        events += _faults(Random(f"{seed}/node {node}"), node, length_s)
    for model in (*FLEETING, MADE):
        events += _models(Random(f"{seed}/{model}"), model, length_s)
    if reloads:
        events += _reloads(Random(f"{seed}/reload"), length_s)
    if renewals:
        kinds: tuple[Kind, ...] = ("restart", "upgrade") if upgrades else ("restart",)
        events += _renewals(Random(f"{seed}/renewal"), length_s, kinds)
    return sorted(events)


def _faults(draw: Random, node: int, length_s: float) -> list[Event]:
    events: list[Event] = []
    at_s = draw.uniform(0.0, UP_S[1])
    while True:
        kind: Kind = draw.choice(("kill", "stop"))
        for_s = draw.choice(AWAY_S if kind == "kill" else STOPPED_S)
        if at_s + for_s > length_s:
            return events
        events.append(Event(at_s, kind, node, for_s=for_s))
        at_s += for_s + draw.uniform(*UP_S)


def _models(draw: Random, model: str, length_s: float) -> list[Event]:
    """The life of one model again and again: it comes to two nodes, or anywhere, leaves one, and is deleted.

    Or it comes to one node and leaves it, without the proxy's being told.
    """
    events: list[Event] = []
    at_s = draw.uniform(*MODEL_PAUSE_S) / 2
    while True:
        node, share = draw.randrange(len(HOUSES)), draw.random()
        life = MADE_LIFE if model == MADE else COMMON_LIFE if share < THROUGH_SHARE else LONE_LIFE
        for kind, through_proxy in life:
            if at_s >= length_s:
                return events
            variant = "anywhere" if kind == "pull" and share < ANYWHERE_SHARE else ""
            events.append(Event(at_s, kind, node, model, through_proxy=through_proxy, variant=variant))
            at_s += draw.uniform(*MODEL_PAUSE_S)


def _reloads(draw: Random, length_s: float) -> list[Event]:
    events: list[Event] = []
    at_s = draw.uniform(*RELOAD_PAUSE_S)
    while at_s < length_s:
        variant = RELOADS[len(events) % len(RELOADS)]
        node = draw.randrange(len(HOUSES))
        events.append(Event(at_s, "reload", node, variant=variant))
        at_s += draw.uniform(*RELOAD_PAUSE_S)
    if events and events[-1].variant == "without":
        events.pop()  # nobody is left out at the end
    return events


def _renewals(draw: Random, length_s: float, kinds: tuple[Kind, ...]) -> list[Event]:
    """``kinds`` by turns; at least two."""
    events: list[Event] = []
    at_s = min(draw.uniform(*RENEWAL_PAUSE_S), length_s / 3)
    while at_s < length_s * 0.8:
        events.append(Event(at_s, kinds[len(events) % len(kinds)]))
        at_s += min(draw.uniform(*RENEWAL_PAUSE_S), length_s / 3)
    return events
