"""Which model gets another runner and which replica is given up: pure, on plain numbers, time passed in.

A model is pressed while requests for it wait longer than ``pressure_s`` for a slot: as things stand, or as
its demand makes likely (Erlang C), whichever is longer. The second shows before a queue has grown; it counts
only where requests have met at all of late, for one user who asks without a pause keeps nobody waiting.
Pressed for ``sustain_s``, it is loaded on the node that serves it best, unless what must go there is wanted
more. A replica that we made ourselves is given up after ``idle_s`` without use, if the others are calm
without it. Two changes to one model, or to one node, are ``cooldown_s`` apart: with that, the time that a
pressure must last and the margin between pressed and calm, a load that comes and goes makes nothing swing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from agent.ollama import names
from proxy_addon.replicas.actions import Action, Load, Unload
from proxy_addon.settings import Replicas

CALM = 0.5  #: share of ``pressure_s`` that the rest must stay below for a replica to be given up
SHORTEST_LOOK = 0.25  #: share of ``pressure_s`` between two plans while requests wait, though nothing happens


@dataclass(frozen=True, slots=True)
class Runner:
    """A model in a node's memory, or on its way there."""

    node: str
    slots: int = 1
    in_flight: int = 0
    waited_s: float = 0.0  #: that the first of the requests beyond its slots has waited already

    def wait_s(self, service_s: float) -> float:
        """Seconds that the last request there waits for a slot, if each keeps it for ``service_s``."""
        return max(self.waited_s, max(self.in_flight - self.slots, 0) * service_s / self.slots)


@dataclass(frozen=True, slots=True)
class Place:
    """A node that has the model on disk and could load it."""

    node: str
    service_s: float  #: that a request would keep a slot there
    load_s: float = 0.0
    evicts: tuple[str, ...] = ()  #: canonical names of what would have to go
    in_flight: int = 0  #: requests on the node, for whichever model


@dataclass(frozen=True, slots=True)
class Wanted:
    """One model: what is asked of it, and who can serve it."""

    rate_per_s: float
    service_s: float  #: that a request keeps a slot
    wait_s: float  #: that requests wait for a slot, as things stand; 0 where none does
    runners: tuple[Runner, ...] = ()
    places: tuple[Place, ...] = ()

    @property
    def slots(self) -> int:
        """Requests that are served at a time."""
        return sum(runner.slots for runner in self.runners)


@dataclass(frozen=True, slots=True)
class State:
    """What must be remembered from one plan to the next. Times are those of ``now_s``."""

    pressed_since_s: Mapping[str, float] = field(default_factory=dict)  #: by model
    used_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    #: (model, node) of each replica that we made → when it was last in use
    met_s: Mapping[str, float] = field(default_factory=dict)  #: by model: when a request last had to wait
    model_changed_s: Mapping[str, float] = field(default_factory=dict)
    node_changed_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, what to remember, and when to plan anew at the latest though nothing happens."""

    actions: tuple[Action, ...]
    state: State
    next_s: float = math.inf


def expected_wait_s(wanted: Wanted, slots: int | None = None) -> float:
    """Seconds that a request waits for a slot, likely by its demand (M/M/c); inf where ever longer."""
    slots = wanted.slots if slots is None else slots
    offered = wanted.rate_per_s * wanted.service_s
    if offered >= slots:
        return math.inf
    return erlang_c(offered, slots) * wanted.service_s / (slots - offered)


def erlang_c(offered: float, slots: int) -> float:
    """Probability that a request finds all ``slots`` taken (Erlang's C); ``offered`` is less than these."""
    blocked = 1.0  # Erlang's B, by its recursion
    for n in range(1, slots + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return slots * blocked / (slots - offered * (1 - blocked))


def plan(
    models: Mapping[str, Wanted],
    pinned: Mapping[str, Collection[str]],
    state: State,
    rules: Replicas,
    now_s: float,
) -> Plan:
    """What to do now. ``models`` is by canonical name; ``pinned`` says what is to stay on which node."""
    planner = _Planner(models, pinned, state, rules, now_s)
    actions: list[Action] = [*planner.give_up(), *planner.spread()]
    return Plan(tuple(actions), planner.state(), planner.next_s())


def due(models: Mapping[str, Wanted], state: State, rules: Replicas, now_s: float) -> list[str]:
    """The models that :func:`plan` would load somewhere now, if it knew their places."""
    return list(_Planner(models, {}, state, rules, now_s).overdue())


class _Planner:
    """One plan in the making."""

    def __init__(
        self,
        models: Mapping[str, Wanted],
        pinned: Mapping[str, Collection[str]],
        state: State,
        rules: Replicas,
        now_s: float,
    ) -> None:
        self.models, self.pinned, self.rules, self.now_s = models, pinned, rules, now_s
        met_s = {key: now_s if wanted.wait_s > 0 else state.met_s.get(key) for key, wanted in models.items()}
        self.met_s = {
            key: at_s for key, at_s in met_s.items() if at_s is not None and now_s - at_s < rules.idle_s
        }
        self.pressure = {
            key: max(wanted.wait_s, expected_wait_s(wanted) if key in self.met_s else 0.0)
            for key, wanted in models.items()
            if wanted.runners
        }
        self.since_s = {
            key: state.pressed_since_s.get(key, now_s)
            for key, waits_s in self.pressure.items()
            if waits_s > rules.pressure_s
        }
        self.used_s = dict(self._in_use(state))
        self.model_changed_s = self._recent(state.model_changed_s)
        self.node_changed_s = self._recent(state.node_changed_s)

    def state(self) -> State:
        """What to remember."""
        return State(self.since_s, self.used_s, self.met_s, self.model_changed_s, self.node_changed_s)

    def next_s(self) -> float:
        """When something becomes due by the mere course of time."""
        rules, changed = self.rules, (*self.model_changed_s.values(), *self.node_changed_s.values())
        due = [since_s + rules.sustain_s for since_s in self.since_s.values()]
        due += [used_s + rules.idle_s for used_s in self.used_s.values()]
        limit_s = rules.pressure_s
        due += [  # a wait grows by a second a second; one just below the limit is not watched all the time
            self.now_s + max(limit_s - wanted.wait_s, SHORTEST_LOOK * limit_s)
            for key, wanted in self.models.items()
            if wanted.wait_s > 0 and key in self.pressure and key not in self.since_s
        ]
        if self.since_s or self.used_s:
            due += [changed_s + rules.cooldown_s for changed_s in changed]
        return min((moment_s for moment_s in due if moment_s > self.now_s), default=math.inf)

    def give_up(self) -> Iterator[Unload]:
        """The replicas of ours that nobody has used for long."""
        for (key, node), used_s in sorted(self.used_s.items(), key=lambda item: item[1]):
            wanted, idle_s = self.models[key], self.now_s - used_s
            rest = wanted.slots - sum(r.slots for r in wanted.runners if r.node == node)
            if (
                idle_s >= self.rules.idle_s
                and max(wanted.wait_s, expected_wait_s(wanted, rest)) < CALM * self.rules.pressure_s
                and key not in self.pinned.get(node, ())
                and self._settled(key, node)
            ):
                del self.used_s[key, node]
                self._change(key, node)
                yield Unload(key, node, f"nobody has used this replica for {idle_s:.0f} s")

    def spread(self) -> Iterator[Load]:
        """Another runner for the models that have been pressed for long, the hardest pressed first."""
        for key in self.overdue():
            lasted_s = self.now_s - self.since_s[key]
            useful = [place for place in self.models[key].places if self._useful(key, place)]
            if not useful:
                continue
            best = min(useful, key=self._cost)
            self.used_s[key, best.node] = self.now_s
            self._change(key, best.node)
            yield Load(key, best.node, self._reason(key, best, lasted_s))

    def overdue(self) -> Iterator[str]:
        """The models that have been pressed for long enough."""
        for key in sorted(self.since_s, key=lambda key: (-self.pressure[key], key)):
            if self.now_s - self.since_s[key] >= self.rules.sustain_s and key not in self.model_changed_s:
                yield key

    def _useful(self, key: str, place: Place) -> bool:
        """Whether a runner at ``place`` helps, takes nothing from who needs it more, and is not rash."""
        wanted = self.models[key]
        own_share = wanted.rate_per_s / (len(wanted.runners) + 1)
        return (
            self._settled(key, place.node)
            and place.service_s < wanted.service_s + self.pressure[key]
            and not any(name in self.pinned.get(place.node, ()) for name in place.evicts)
            and all(self._may_go(name, own_share) for name in place.evicts)
        )

    def _may_go(self, key: str, for_share: float) -> bool:
        """Whether a runner of ``key`` may make room for one that is wanted ``for_share`` times a second.

        The last one of a model that would be back within ``cooldown_s`` stays, or they would take turns.
        """
        wanted = self.models.get(key)
        last = wanted is not None and len(wanted.runners) <= 1
        back_soon = wanted is not None and wanted.rate_per_s * self.rules.cooldown_s >= 1
        return self._share(key) < for_share and not (last and back_soon)

    def _share(self, key: str) -> float:
        """Requests a second that each runner of ``key`` serves: what one of them is wanted."""
        wanted = self.models.get(key)
        return wanted.rate_per_s / max(len(wanted.runners), 1) if wanted else 0.0

    def _cost(self, place: Place) -> tuple[float, float, float, str]:
        """What of two places the better one has less of."""
        evicted = sum(self._share(name) for name in place.evicts)
        return evicted, place.service_s * (1 + place.in_flight), place.load_s, place.node

    def _reason(self, key: str, place: Place, lasted_s: float) -> str:
        wanted, waits_s = self.models[key], self.pressure[key]
        how = f"waits {waits_s:.1f} s" if math.isfinite(waits_s) else "waits ever longer"
        gone = f"; {', '.join(map(names.display, place.evicts))} must go, wanted less" if place.evicts else ""
        return (
            f"for {lasted_s:.0f} s a request {how} for one of {wanted.slots} slots"
            f" ({wanted.rate_per_s:.2f} requests/s of {wanted.service_s:.1f} s each){gone}"
        )

    def _in_use(self, state: State) -> Iterator[tuple[tuple[str, str], float]]:
        """Our replicas that are still there, and when each was last in use."""
        for (key, node), used_s in state.used_s.items():
            runners = self.models[key].runners if key in self.models else ()
            for runner in runners:
                if runner.node == node:
                    yield (key, node), self.now_s if runner.in_flight else used_s

    def _recent(self, changed_s: Mapping[str, float]) -> dict[str, float]:
        return {name: at_s for name, at_s in changed_s.items() if self.now_s < at_s + self.rules.cooldown_s}

    def _settled(self, key: str, node: str) -> bool:
        return key not in self.model_changed_s and node not in self.node_changed_s

    def _change(self, key: str, node: str) -> None:
        self.model_changed_s[key] = self.node_changed_s[node] = self.now_s
