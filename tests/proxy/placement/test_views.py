"""What is kept between decisions never shows: whatever happens, a decision is what it would be afresh."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.placement import policies, view
from proxy_addon.placement.policies import POLICIES, TOO_GOOD, decide
from proxy_addon.placement.rules import Rules
from proxy_addon.record import FinalStats
from tests.proxy.placement.test_diversion import shard_report
from tests.proxy.placement.worlds import DAY, GIB, NOW_S, ask, name, node, report, resident, row, told

KEYS = ("m", "other", "third")
PREFIXES = ((), ((b"a", 100),), ((b"a", 100), (b"b", 180)))
RULES = (
    Rules(),
    Rules(specialise={"generation": frozenset({name(1), name(2)})}, specialise_factor=3.0),
    Rules(embeddings_max_vram_bytes=10 * GIB, min_gpu_share=0.5),
)


class World:
    """A fleet to which things happen at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.fleet, self.speeds, self.now_s = Fleet(), Speeds(), NOW_S
        self.flights: list[Flight] = []
        self.changed = False  #: which nodes compete at all; in large fleets that is found out once a second
        for number in range(6):
            self.add(number)

    def add(self, number: int) -> None:
        rows = {key: row(self.rng.choice((2, 4, 9)), context_length=32_768) for key in KEYS}
        n = node(self.fleet, number, models=rows, report=self.some_report(), parallel=self.rng.randint(1, 3))
        n.resident = {key: self.some_resident() for key in KEYS if self.rng.random() < 0.4}

    def some_report(self) -> Any:
        gib = self.rng.choice((0, 8, 24))
        free = self.rng.uniform(0, gib)
        return report(gib, free, self.rng.choice((8, 64)), self.rng.choice((200e9, 900e9)))

    def some_resident(self) -> Any:
        on_gpu = self.rng.choice((1.0, 0.5, 0.0))
        return resident(self.rng.choice((3, 5)), on_gpu, self.rng.choice((4096, 8192)))

    def some_ask(self) -> Ask:
        path = self.rng.choice(("/api/chat", "/api/chat", "/api/embed"))
        num_ctx = self.rng.choice((None, None, 4096, 8192))
        more = {"reload_key": (("num_gpu", 10),)} if self.rng.random() < 0.2 else {}
        return ask(self.rng.choice(KEYS), path, 200, num_ctx, prefix=self.rng.choice(PREFIXES), **more)

    def happen(self) -> None:
        """One event."""
        self.changed = False
        self.rng.choice(EVENTS)(self, self.rng.choice(list(self.fleet.nodes.values())))
        if not self.fleet.nodes:
            self.add(0)


def _take(world: World, n: Node) -> None:
    asked = world.some_ask()
    load = world.rng.random() < 0.1
    flight = n.take(asked, world.now_s, world.rng.uniform(0.1, 9), load, world.rng.uniform(0.05, 0.1))
    if world.rng.random() < 0.7:
        n.loaded_with[asked.key] = asked.reload_key
    world.flights.append(flight)


def _drop(world: World, n: Node) -> None:
    if world.flights:
        world.flights.pop(world.rng.randrange(len(world.flights))).drop(20)


def _stream(world: World, n: Node) -> None:
    for flight in n.flights:
        flight.first_byte_s = world.now_s
    world.now_s += 0.01


def _pass_time(world: World, n: Node) -> None:
    world.now_s += world.rng.choice((0.01, 0.3, 1.1, 20.0))


def _observe(world: World, n: Node) -> None:
    stats = FinalStats(200, 100, world.rng.choice((0.0, 2.0)), 0.2, world.rng.uniform(1, 9))
    world.speeds.observe(n, world.some_ask(), stats, 0.3, 9.0, 1, world.now_s)
    world.now_s += 1.0  # so are outcomes


def _ask_for(world: World, n: Node) -> None:
    world.speeds.demand.note(world.some_ask(), world.now_s)
    world.now_s += 1.0  # demand is read once a second


def _pin(world: World, n: Node) -> None:
    n.pinned = frozenset({world.rng.choice(KEYS)})
    world.now_s += 1.0


def _report(world: World, n: Node) -> None:
    world.changed = n.coordinator  # it is one no longer
    n.report = world.rng.choice((None, world.some_report(), n.report and n.report.model_copy()))


def _polled(world: World, n: Node) -> None:
    n.poll_error = world.rng.choice((None, "it refused the connection"))
    n.poll_latency_s = world.rng.choice((0.01, 0.2))
    world.changed = True  # which version is the newest, as well


def _hold(world: World, n: Node) -> None:
    found = {key: world.some_resident() for key in KEYS if world.rng.random() < 0.5}
    if world.rng.random() < 0.5:
        n.holds(found)
    else:
        n.resident.clear()
        n.resident.update(found)


def _other_version(world: World, n: Node) -> None:
    new = row(digest="new").model_copy(update={"modified_at": DAY + timedelta(days=1)})
    n.models = {**n.models, "m": new}  # a new table, as the polls bring it
    world.changed = True


def _lose_model(world: World, n: Node) -> None:
    n.models = {key: held for key, held in n.models.items() if key != "m"}


def _shape(world: World, n: Node) -> None:
    world.fleet.shapes["d"] = {
        "general.architecture": "llama",
        "llama.block_count": world.rng.choice((16, 32)),
        "llama.embedding_length": 4096,
        "llama.attention.head_count": 32,
    }


def _become_coordinator(world: World, n: Node) -> None:
    n.report = shard_report()
    world.changed = True


EVENTS: list[Callable[[World, Node], object]] = [
    *(
        _take,
        _take,
        _take,
        _take,
        _drop,
        _drop,
        _drop,
        _stream,
        _pass_time,
        _observe,
        _ask_for,
        _pin,
        _report,
        _polled,
        _hold,
        _hold,
    ),
    *(_other_version, _lose_model, _shape, _become_coordinator),
    lambda world, n: n.health.failed(world.now_s, "reset", fatal=world.rng.random() < 0.5),
    lambda world, n: n.health.succeeded(),
    lambda world, n: n.health.polled(),
    lambda world, n: world.speeds.observe_failure(n.name, 0.5, world.now_s),
    lambda world, n: world.speeds.observe_size("m", 4096, world.rng.randint(1, 20) * GIB),
    lambda world, n: setattr(n, "full_until_s", world.now_s + 1),
    lambda world, n: n.unfit_until_s.update(m=world.now_s + 1),
    lambda world, n: setattr(n, "leaving", not n.leaving),
    lambda world, n: setattr(n, "parallel", world.rng.randint(1, 3)),
    lambda world, n: setattr(n, "preferred_tasks", frozenset({"embedding"})),
    lambda world, n: world.fleet.remove(n),
    lambda world, n: world.add(world.rng.randint(0, 9)),
]


def afresh(fleet: Fleet) -> Fleet:
    """The same nodes, of which nothing was worked out yet."""
    return Fleet(dict(fleet.nodes), shapes=fleet.shapes)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    steps=st.integers(1, 40),
    policy=st.sampled_from(sorted(POLICIES)),
    rules=st.sampled_from(RULES),
)
def test_a_decision_is_what_it_would_be_afresh_whatever_has_happened(
    seed: int, steps: int, policy: str, rules: Rules
) -> None:
    world = World(random.Random(seed))
    asks = [ask("m"), world.some_ask(), world.some_ask()]
    for _ in range(steps):
        world.happen()
        tried = {name(3): "died: reset"} if world.rng.random() < 0.2 else {}
        others = (world.speeds, world.now_s, policy, tried, rules)
        for asked in asks:
            kept = told(decide(asked, world.fleet, *others))
            assert kept == told(decide(asked, afresh(world.fleet), *others))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    steps=st.integers(1, 40),
    policy=st.sampled_from(sorted(POLICIES)),
    rules=st.sampled_from(RULES),
)
def test_a_large_fleets_decision_is_that_of_a_small_one_each_second_and_never_for_who_may_not_serve(
    seed: int, steps: int, policy: str, rules: Rules
) -> None:
    world = World(random.Random(seed))
    for _ in range(steps):
        world.happen()
        world.now_s += world.changed
        asked, tried = world.some_ask(), dict[str, str]()
        others = (world.speeds, world.now_s, policy, tried, rules)
        whole = decide(asked, afresh(world.fleet), *others)
        with pytest.MonkeyPatch.context() as patch:
            for module in (policies, view):
                patch.setattr(module, "WHOLE", 0)
            large = decide(asked, world.fleet, *others)
            exact = decide(asked, afresh(world.fleet), *others)
        assert exact.node == whole.node
        able = {c.node for c in whole.candidates if c.excluded in (None, TOO_GOOD)}
        assert large.node in able or not able
        assert (large.node is None) == (whole.node is None)


def test_nothing_is_kept_of_models_that_nobody_has() -> None:
    fleet, speeds = Fleet(), Speeds()
    n = node(fleet, 1)
    for key in ("m", "none", "nobody"):
        decide(ask(key), fleet, speeds, NOW_S)
    assert list(fleet.views) == ["m"]
    n.models = {}
    decide(ask(), fleet, speeds, NOW_S)
    assert not fleet.views
