"""The plan of replicas on made-up numbers: when one is made, where, when it is given up, that all is calm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_addon.replicas.actions import Action, Load
from proxy_addon.replicas.plan import Place, Plan, Runner, State, Wanted, erlang_c, expected_wait_s, plan
from proxy_addon.settings import Replicas

RULES = Replicas(pressure_s=2, sustain_s=10, idle_s=300, cooldown_s=60)
HOT = Wanted(0.9, 1.0, 0.1, (Runner("a", in_flight=1),), (Place("b", 1.0), Place("c", 1.0)))


def plans(
    models: dict[str, Wanted], at_s: Iterable[float], state: State | None = None, **pinned: set[str]
) -> Plan:
    """The last of several plans on the same numbers; those before it must do nothing."""
    made, state = Plan((), state or State()), state or State()
    for now_s in at_s:
        assert not made.actions
        made = plan(models, pinned, state, RULES, now_s)
        state = made.state
    return made


def what(actions: Iterable[Action]) -> list[tuple[str, str, str]]:
    return [(action.name, action.model, action.node) for action in actions]


def test_the_expected_wait_is_that_of_queueing_theory() -> None:
    # One server: rho / (1 - rho) services. Two servers at half load: C = 1/3.
    assert expected_wait_s(Wanted(0.9, 1.0, 0.0, (Runner("a"),))) == pytest.approx(9)
    assert erlang_c(1.0, 2) == pytest.approx(1 / 3)
    assert expected_wait_s(Wanted(1.0, 1.0, 0.0, (Runner("a", slots=2),))) == pytest.approx(1 / 3)
    assert expected_wait_s(Wanted(2.0, 1.0, 0.0, (Runner("a", slots=2),))) == math.inf


def test_the_present_wait_counts_where_demand_does_not_show_it_yet() -> None:
    made = plans({"m": replace(HOT, rate_per_s=0.01, wait_s=7.0)}, (0, 10))
    assert "a request waits 7.0 s" in made.actions[0].reason
    assert Runner("a", slots=2, in_flight=2).wait_s(4) == 0
    assert Runner("a", slots=2, in_flight=3).wait_s(4) == 2  # the first of two to end
    assert Runner("a", slots=1, in_flight=3).wait_s(4) == 8
    assert Runner("a", slots=1, in_flight=2, waited_s=50).wait_s(4) == 50  # all take longer than expected


def test_one_user_who_asks_without_a_pause_needs_no_second_runner() -> None:
    alone = replace(HOT, rate_per_s=1.0, wait_s=0.0)
    state = plans({"m": alone}, (0, 10, 1000)).state
    assert what(plans({"m": replace(alone, wait_s=0.1)}, (1001, 1011), state).actions) == [("load", "m", "b")]
    state = plans({"m": replace(alone, wait_s=0.1)}, (1001,), state).state
    assert not plans({"m": alone}, (1301, 1400), state).actions  # it has been long since two have met


def test_a_wait_that_grows_is_looked_at_when_it_may_be_too_long() -> None:
    waiting = replace(HOT, rate_per_s=0.0, wait_s=0.5)
    assert plan({"m": waiting}, {}, State(), RULES, 100).next_s == 101.5
    assert plan({"m": replace(waiting, wait_s=1.99)}, {}, State(), RULES, 100).next_s == 100.5


def test_a_model_that_is_pressed_for_long_gets_another_runner() -> None:
    made = plans({"m": HOT}, (0, 9.9, 10))
    assert what(made.actions) == [("load", "m", "b")]
    assert "for 10 s a request waits 9.0 s for one of 1 slots (0.90 requests/s" in made.actions[0].reason


def test_the_next_plan_is_due_when_the_pressure_has_lasted() -> None:
    assert plan({"m": HOT}, {}, State(), RULES, 5).next_s == 15


def test_a_pressure_that_ends_before_its_time_is_forgotten() -> None:
    calm = replace(HOT, rate_per_s=0.1)
    state = plans({"m": HOT}, (0, 9)).state
    state = plans({"m": calm}, (9.5,), state).state
    assert not plans({"m": HOT}, (10, 19), state).actions


def test_a_model_in_nobodys_memory_is_left_to_its_first_request() -> None:
    absent = replace(HOT, runners=())
    assert plans({"m": absent}, (0, 100)).next_s == math.inf


@pytest.mark.parametrize(
    ("places", "chosen"),
    [
        ((Place("b", 4.0), Place("c", 1.0)), "c"),  # the faster
        ((Place("b", 1.0, in_flight=3), Place("c", 2.0)), "c"),  # the idle, if not much slower
        ((Place("b", 1.0, load_s=9), Place("c", 1.0, load_s=3)), "c"),  # the sooner ready
        ((Place("b", 1.0, evicts=("cold",)), Place("c", 3.0)), "c"),  # the one that costs nobody anything
        ((Place("b", 1.0, evicts=("cold",)),), "b"),
        ((Place("b", 1.0, evicts=("twice",)),), "b"),
        ((Place("b", 1.0, evicts=("warm",)),), None),  # wanted more than a second runner would be
        ((Place("b", 1.0, evicts=("last",)),), None),  # it would be back at once
        ((Place("b", 1.0, evicts=("pin",)),), None),
        ((Place("b", 30.0),), None),  # who waits is served sooner
        ((), None),
    ],
)
def test_where_the_runner_goes(places: tuple[Place, ...], chosen: str | None) -> None:
    models = {
        "m": replace(HOT, places=places),
        "cold": Wanted(0.01, 1.0, 0.0, (Runner("b"),)),
        "last": Wanted(0.02, 1.0, 0.0, (Runner("b"),)),
        "twice": Wanted(0.2, 1.0, 0.0, (Runner("b"), Runner("d"))),
        "warm": Wanted(1.0, 1.0, 0.0, (Runner("b"), Runner("d"))),
    }
    made = plans(models, (0, 10), b={"pin"})
    assert what(made.actions) == ([("load", "m", chosen)] if chosen else [])


def test_a_change_waits_for_the_one_before_on_the_same_model_or_node() -> None:
    both = {"m": HOT, "n": replace(HOT, places=(Place("b", 1.0),))}
    made = plans(both, (0, 10))
    assert what(made.actions) == [("load", "m", "b")]  # n may not have b now, and nothing else would help
    more = {
        "m": replace(HOT, runners=(*HOT.runners, Runner("b")), places=(Place("c", 1.0),), rate_per_s=1.9),
        "n": replace(HOT, rate_per_s=0.1),
    }
    made = plans(more, (11, 69.9), made.state)
    assert made.next_s == 70
    assert what(plans(more, (70,), made.state).actions) == [("load", "m", "c")]


def with_replica(used_s: float = 0.0, **changes: object) -> tuple[dict[str, Wanted], State]:
    """A calm model with a runner of its own at a and a replica of ours at b."""
    model = Wanted(0.01, 1.0, 0.0, (Runner("a"), Runner("b")))
    return {"m": replace(model, **changes)}, State(used_s={("m", "b"): used_s})


def test_a_replica_is_given_up_once_idle() -> None:
    models, state = with_replica()
    made = plans(models, (0, 299.9), state)
    assert made.next_s == 300
    made = plans(models, (300,), made.state)
    assert what(made.actions) == [("unload", "m", "b")]
    assert made.actions[0].reason == "nobody has used this replica for 300 s"


def test_a_replica_in_use_stays() -> None:
    models, state = with_replica(runners=(Runner("a"), Runner("b", in_flight=1)))
    state = plans(models, (299,), state).state
    models, _ = with_replica()
    assert not plans(models, (300, 598.9), state).actions


@pytest.mark.parametrize("model", [{"rate_per_s": 0.7}, {"runners": (Runner("b"),)}], ids=str)
def test_a_replica_stays_where_the_rest_would_not_be_calm(model: dict[str, object]) -> None:
    models, state = with_replica(**model)
    assert not plans(models, (300, 1000), state).actions


def test_a_pinned_replica_stays() -> None:
    models, state = with_replica()
    assert not plans(models, (300, 1000), state, b={"m"}).actions


def test_only_our_own_replicas_are_given_up() -> None:
    models, _ = with_replica()
    assert not plans(models, (0, 10_000)).actions


def test_a_replica_that_somebody_else_has_ended_is_forgotten() -> None:
    models, state = with_replica(runners=(Runner("a"),))
    state = plans(models, (1,), state).state
    models, _ = with_replica()
    assert not plans(models, (1000,), state).actions


# a little world in which the plans come true


@dataclass
class World:
    """Models and nodes; a runner serves whatever comes in equal shares, a model without one is loaded."""

    nodes: tuple[str, ...]
    at: dict[str, set[str]]
    models_a_node: int = 2
    state: State = field(default_factory=State)
    changes: list[tuple[float, Action]] = field(default_factory=list)

    def step(self, now_s: float, rates: dict[str, float], rules: Replicas) -> None:
        for key, nodes in self.at.items():
            if rates.get(key) and not nodes:
                self._load(key, min(self.nodes, key=lambda node: (len(self._evicts(node)), node)))
        made = plan({key: self._wanted(key, rates) for key in self.at}, {}, self.state, rules, now_s)
        self.state = made.state
        for action in made.actions:
            self.changes.append((now_s, action))
            if isinstance(action, Load):
                self._load(action.model, action.node)
            else:
                self.at[action.model].discard(action.node)
                assert self.at[action.model], "the last runner was given up"

    def _load(self, model: str, node: str) -> None:
        for key in self._evicts(node):
            self.at[key].discard(node)
        self.at[model].add(node)

    def _evicts(self, node: str) -> tuple[str, ...]:
        held = sorted(key for key, nodes in self.at.items() if node in nodes)
        return tuple(held[: max(len(held) + 1 - self.models_a_node, 0)])

    def _wanted(self, key: str, rates: dict[str, float]) -> Wanted:
        rate, there = rates.get(key, 0.0), sorted(self.at[key])
        busy = math.ceil(rate / max(len(there), 1))
        return Wanted(
            rate,
            1.0,
            max(rate - len(there), 0.1 if rate > 0.3 else 0.0),
            tuple(Runner(node, in_flight=busy) for node in there),
            tuple(Place(node, 1.0, evicts=self._evicts(node)) for node in self.nodes if node not in there),
        )


NODES = ("a", "b", "c")
MODELS = ("m", "n", "o")
demands = st.lists(
    st.tuples(
        st.sampled_from([0.1, 1.0, 7.0, 30.0]),  # seconds until the next change of demand
        st.fixed_dictionaries({key: st.sampled_from([0.0, 0.1, 0.6, 0.95, 2.5]) for key in MODELS}),
    ),
    min_size=1,
    max_size=60,
)
rules = st.builds(
    Replicas,
    pressure_s=st.sampled_from([0.5, 2.0]),
    sustain_s=st.sampled_from([0.0, 3.0]),
    idle_s=st.sampled_from([1.0, 5.0, 40.0]),
    cooldown_s=st.sampled_from([2.0, 20.0]),
)


def played(
    demand: Iterable[tuple[float, dict[str, float]]], limits: Replicas, models_a_node: int = 2
) -> World:
    """A world through a sequence of (how long, rates by model), looked at every half second."""
    world, now_s = World(NODES, {"m": {"a"}, "n": {"b"}, "o": {"c"}}, models_a_node), 0.0
    for lasts_s, rates in demand:
        until_s = now_s + lasts_s
        while now_s < until_s:
            world.step(now_s, rates, limits)
            now_s += 0.5
    return world


@given(demands, rules, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_two_changes_to_a_model_or_node_are_a_cooldown_apart(
    demand: list[tuple[float, dict[str, float]]], limits: Replicas, models_a_node: int
) -> None:
    world = played(demand, limits, models_a_node)
    by: dict[str, list[float]] = defaultdict(list)
    for at_s, action in world.changes:
        by[f"model {action.model}"].append(at_s)
        by[f"node {action.node}"].append(at_s)
    for times in by.values():
        assert all(b - a >= limits.cooldown_s for a, b in pairwise(times))


@given(demands, rules)
@settings(max_examples=150, deadline=None)
def test_nothing_is_done_without_need(demand: list[tuple[float, dict[str, float]]], limits: Replicas) -> None:
    """What we give up we have made, and is not the last; every action has a reason."""
    world = played(demand, limits)
    ours: set[tuple[str, str]] = set()
    for _, action in world.changes:
        assert action.reason
        if isinstance(action, Load):
            ours.add((action.model, action.node))
        else:
            assert (action.model, action.node) in ours


@pytest.mark.parametrize("period_s", [4, 20, 60, 200])
@pytest.mark.parametrize(
    "load", [lambda on: {"m": 0.95 if on else 0.0}, lambda on: {"m": 0.95, "n": 0.0} if on else {"n": 0.95}]
)
def test_a_load_that_comes_and_goes_makes_nothing_swing(
    period_s: int, load: Callable[[bool], dict[str, float]]
) -> None:
    """Off for less than ``idle_s``: each model is spread at most once to each node, and nothing is undone."""
    limits = Replicas(pressure_s=2, sustain_s=1, idle_s=300, cooldown_s=5)
    world = played([(period_s / 2, load(n % 2 == 0)) for n in range(2 * 1800 // period_s)], limits)
    assert all(isinstance(action, Load) for _, action in world.changes)
    assert len(set(what(action for _, action in world.changes))) == len(world.changes) <= 4
    assert ("load", "m", "b") in what(action for _, action in world.changes)


def test_a_load_that_pauses_for_longer_costs_one_load_and_one_unload_each_time() -> None:
    limits = Replicas(pressure_s=2, sustain_s=1, idle_s=50, cooldown_s=5)
    on_off = [(100.0, {"m": 0.95}), (100.0, {"m": 0.0})]
    assert [action.name for _, action in played(on_off * 3, limits).changes] == ["load", "unload"] * 3


@given(st.lists(st.floats(0.5, 0.75), min_size=20, max_size=200))
@settings(max_examples=50, deadline=None)
def test_a_demand_that_trembles_about_the_limit_makes_nothing_swing(rates: list[float]) -> None:
    """At 2/3 of a slot the wait is ``pressure_s``; a replica is only given up below half of that."""
    limits = Replicas(pressure_s=2, sustain_s=0, idle_s=5, cooldown_s=2)
    world = played([(3.0, {"m": rate}) for rate in rates], limits)
    assert len(world.changes) <= 2 and all(isinstance(action, Load) for _, action in world.changes)
