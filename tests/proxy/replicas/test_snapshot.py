"""What of a fleet the plans get to see."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.rules import NO_RULES, Rules
from proxy_addon.replicas import snapshot
from proxy_addon.replicas.pins import Past, Pin, Stand
from proxy_addon.replicas.plan import Runner, Wanted
from tests.proxy.placement.worlds import NOW_S, ask, name, node, report, resident, row


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def take(at: Node, count: int, age_s: float = 0.0, service_s: float = 4.0) -> None:
    for _ in range(count):
        at.take(ask(), NOW_S - age_s, service_s, service_s=service_s)


def wanted(fleet: Fleet, **more: Any) -> dict[str, Wanted]:
    how: dict[str, Any] = {"rules": NO_RULES, "service_s": {}, "waiting": (), "followed": ()} | more
    return snapshot.wanted(fleet, Speeds(), **how, now_s=NOW_S)


def places(fleet: Fleet, rules: Rules = NO_RULES, busy: set[str] = frozenset()) -> dict[str, tuple[str, ...]]:  # type: ignore[assignment]
    """The names of the places for ``m``, each with what it would evict."""
    model = Wanted(1.0, 2.0, 0.0, (Runner(name(1)),))
    found = snapshot.places("m", model, fleet, Speeds(), rules, busy, NOW_S)
    return {place.node: place.evicts for place in found}


def test_the_wait_is_that_of_the_node_where_it_is_shortest(fleet: Fleet) -> None:
    for number, count in ((1, 4), (2, 2)):
        take(node(fleet, number, resident={"m": resident()}), count)
    model = wanted(fleet)["m"]
    assert {(r.node, r.in_flight) for r in model.runners} == {(name(1), 4), (name(2), 2)}
    assert (model.service_s, model.wait_s) == (4, 4)


def test_what_was_measured_counts_before_what_was_expected(fleet: Fleet) -> None:
    take(node(fleet, 1, resident={"m": resident()}), 2)
    assert wanted(fleet, service_s={"m": 9.0})["m"].wait_s == 9


def test_a_request_that_waits_for_longer_than_expected_says_so(fleet: Fleet) -> None:
    take(node(fleet, 1, resident={"m": resident()}), 2, age_s=30)
    assert wanted(fleet)["m"].wait_s == 30


def test_the_proxys_own_line_counts(fleet: Fleet) -> None:
    take(node(fleet, 1, resident={"m": resident()}), 1)
    assert wanted(fleet, waiting=[("m", 1.0), ("m", 0.5), ("x", 99.0)])["m"].wait_s == 8
    assert wanted(fleet, waiting=[("m", 50.0)])["m"].wait_s == 50


def test_a_model_is_followed_between_two_requests(fleet: Fleet) -> None:
    node(fleet, 1, resident={"m": resident()})
    assert wanted(fleet) == {}
    assert wanted(fleet, followed={"m", "gone"}).keys() == {"m"}


def test_a_load_under_way_counts_as_a_runner(fleet: Fleet) -> None:
    take(node(fleet, 1, resident={"m": resident()}), 1)
    node(fleet, 2).take(ask(load_only=True), NOW_S, 5.0, load=True, service_s=0.0)
    assert {runner.node for runner in wanted(fleet)["m"].runners} == {name(1), name(2)}


@pytest.mark.parametrize("rules", [Rules(frozenset({"m"})), NO_RULES])
def test_coordinators_and_what_is_theirs_are_left_alone(fleet: Fleet, rules: Rules) -> None:
    take(
        node(fleet, 1, kind="ollama" if rules.models else "shard", report=None, resident={"m": resident()}), 3
    )
    assert wanted(fleet, rules=rules) == {}


def test_places_are_the_other_nodes_that_could_load_it(fleet: Fleet) -> None:
    node(fleet, 1, resident={"m": resident()})
    node(fleet, 2)
    node(fleet, 3, report=report(free_gib=2), resident={"x": resident()}, models={"m": row(), "x": row()})
    node(fleet, 4, models={"x": row()})  # not on disk
    node(fleet, 5, poll_error="refused")
    node(fleet, 6, report=report(gpu_gib=1, ram_gib=1))  # too small
    node(fleet, 7, report=report(gpu_gib=0))
    assert places(fleet) == {name(2): (), name(3): ("x",), name(7): ()}
    assert places(fleet, busy={name(2)}).keys() == {name(3), name(7)}


def test_a_slower_place_keeps_a_request_longer(fleet: Fleet) -> None:
    node(fleet, 1, resident={"m": resident()}, report=report(bandwidth=800e9))
    node(fleet, 2, report=report(bandwidth=200e9))
    model = Wanted(1.0, 2.0, 0.0, (Runner(name(1)),))
    [place] = snapshot.places("m", model, fleet, Speeds(), NO_RULES, (), NOW_S)
    assert place.service_s == pytest.approx(8)


def test_a_kept_runner_is_asked_for_under_its_own_options(fleet: Fleet) -> None:
    there = node(fleet, 1, resident={"m": resident(context=8192)}, loaded_with={"m": (("num_batch", 64),)})
    assert snapshot.options_there(there, "m") == {"num_batch": 64, "num_ctx": 8192}
    assert snapshot.options_in_use(fleet, "m") == (("num_batch", 64),)
    assert snapshot.load_ask("m", (("num_ctx", 8192),)).num_ctx == 8192


def stand(fleet: Fleet, at: str | None = None, past: Past | None = None, acting: Any = ()) -> Stand:
    return snapshot.stand(Pin("m", at), past or Past(), fleet, Speeds(), NO_RULES, acting, NOW_S)


def staying(seconds: float) -> dict[str, Any]:
    return {"m": resident().model_copy(update={"expires_at": datetime.now(UTC) + timedelta(seconds=seconds)})}


def test_a_pin_stands_where_it_is_in_memory(fleet: Fleet) -> None:
    node(fleet, 1)
    node(fleet, 2, resident=staying(300))
    found = stand(fleet)
    assert found.node == name(2) and found.stays_s == pytest.approx(300, abs=5)


def test_of_several_it_stands_where_it_stood_and_else_where_it_stays_longest(fleet: Fleet) -> None:
    node(fleet, 1, resident=staying(300))
    node(fleet, 2, resident=staying(900))
    assert (stand(fleet).node, stand(fleet).also) == (name(2), {name(1)})
    assert stand(fleet, past=Past(name(1))).node == name(1)
    fleet.nodes[name(1)].pinned = frozenset({"m"})  # by another pin
    assert stand(fleet).also == frozenset()


def test_a_node_that_is_only_ejected_keeps_its_pin(fleet: Fleet) -> None:
    node(fleet, 1, resident=staying(900)).health.ejected_until_s = NOW_S + 60
    node(fleet, 2)
    assert stand(fleet).node == name(1)


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("10.9.9.9:11434", "no node 10.9.9.9:11434 is known"),
        (name(3), f"{name(3)} is down: it refused the connection"),
        (name(4), f"{name(4)} does not have the model"),
        (name(5), f"{name(5)} does not fit: needs"),
        (name(6), f"{name(6)} would give up x:latest, which is pinned there"),
    ],
)
def test_a_pin_that_cannot_be_met_says_why(fleet: Fleet, at: str, why: str) -> None:
    node(fleet, 1)
    node(fleet, 3, poll_error="it refused the connection")
    node(fleet, 4, models={})
    node(fleet, 5, report=report(gpu_gib=1, ram_gib=1))
    node(fleet, 6, report=report(free_gib=1), resident={"x": resident()}, pinned=frozenset({"x"}))
    found = stand(fleet, at)
    assert found.node is None and found.why.startswith(why) and ";" not in found.why


def test_a_free_pin_goes_where_nothing_pinned_must_go(fleet: Fleet) -> None:
    node(fleet, 1, report=report(free_gib=1), resident={"x": resident()}, pinned=frozenset({"x"}))
    node(fleet, 2, report=report(bandwidth=50e9))
    assert stand(fleet) == Stand(name(2))
    assert stand(Fleet()).why == "no node has it"
