"""A model that only an assumed context makes too big is tried where nobody is known to hold it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import POLICIES, decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.view import WHOLE
from tests.proxy.placement.test_diversion import shard_report
from tests.proxy.placement.worlds import NOW_S, ask, name, node, report, resident, row

KEY = "registry.ollama.ai/library/m:latest"
OUT = "does not fit: needs 121.3 GiB, has 79.6 GiB"
DOUBT = f"may be too big: at num_ctx 262144, which is assumed, it {OUT}"
TOLD = "; no node is known to hold the model, but the request names no num_ctx: Ollama itself decides"


def large(fleet: Fleet, number: int = 1) -> Node:
    """A node of 64 GiB with a small model: at Ollama's default for it and in 8 slots that is too much."""
    return node(fleet, number, models={KEY: row(1)}, report=report(gpu_gib=64), parallel=8)


def choose(fleet: Fleet, num_ctx: int | None = None, **more: object) -> Decision:
    return decide(ask(KEY, num_ctx=num_ctx), fleet, Speeds(), NOW_S, **more)  # type: ignore[arg-type]


def why(decision: Decision) -> dict[str, str | None]:
    return {c.node: c.excluded for c in decision.candidates}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [1, 2, WHOLE + 10])
def test_the_best_is_tried_where_only_an_assumed_context_is_too_much(policy: str, size: int) -> None:
    fleet = Fleet()
    for number in range(size):
        large(fleet, number)
    decision = choose(fleet, policy=policy)
    assert decision.chosen is not None
    assert decision.chosen.notes == ("load", DOUBT)
    assert TOLD in decision.reason


def test_a_context_that_is_named_is_believed() -> None:
    fleet = Fleet()
    large(fleet)
    decision = choose(fleet, num_ctx=262_144)
    assert (decision.node, why(decision)) == (None, {name(1): OUT})
    assert choose(fleet, num_ctx=4096).node == name(1)


def test_weights_that_are_too_big_are_so_at_any_context() -> None:
    fleet = Fleet()
    large(fleet).models[KEY] = row(100)
    assert choose(fleet).node is None


def test_never_while_another_node_holds_it() -> None:
    fleet = Fleet()
    large(fleet)
    node(fleet, 2, models={KEY: row(1)})
    decision = choose(fleet)
    assert (decision.node, why(decision)[name(1)]) == (name(2), OUT)


def _full(n: Node) -> None:
    n.full_until_s = NOW_S + 1


def _coming_back(n: Node) -> None:
    n.health.failed(NOW_S - 100, "reset", fatal=True)
    n.take(ask(KEY), NOW_S, 1.0)


def _nothing(_: Node) -> None:
    return


@pytest.mark.parametrize("state", [_full, _coming_back, _nothing])
@pytest.mark.parametrize("kind", ["ollama", "shard"])
def test_who_holds_it_and_is_only_busy_is_waited_for(kind: str, state: Callable[[Node], None]) -> None:
    """Also where admission, or an attempt before this one, has excluded it."""
    fleet = Fleet()
    large(fleet)
    told = shard_report() if kind == "shard" else report()
    state(node(fleet, 2, models={KEY: row(1)}, report=told))
    decision = choose(fleet, excluded={name(2): "has no slot free"})
    assert decision.node is None
    assert why(decision)[name(1)] == OUT


def _down(n: Node) -> None:
    n.poll_error = "it refused the connection"


def _out_of_memory(n: Node) -> None:
    n.unfit_until_s[KEY] = NOW_S + 1


def _without(n: Node) -> None:
    n.models.clear()


@pytest.mark.parametrize("state", [_down, _out_of_memory, _without])
@pytest.mark.parametrize("kind", ["ollama", "shard"])
def test_who_cannot_serve_it_is_not(kind: str, state: Callable[[Node], None]) -> None:
    fleet = Fleet()
    large(fleet)
    told = shard_report() if kind == "shard" else report()
    state(node(fleet, 2, models={KEY: row(1)}, report=told))
    assert choose(fleet).node == name(1)


def test_a_coordinator_that_holds_it_comes_first_and_one_that_does_not_is_told_of() -> None:
    fleet = Fleet()
    large(fleet)
    sharded = node(fleet, 91, kind="shard", models={KEY: row(1)}, report=shard_report())
    assert choose(fleet).node == name(91)
    sharded.report = shard_report(fits=False, why="too big")
    decision = choose(fleet)
    assert (decision.node, why(decision)[name(91)]) == (name(1), "does not fit its nodes: too big")
    assert choose(fleet, rules=Rules(models=frozenset({KEY}))).node is None


def test_each_is_tried_once_and_who_was_out_of_memory_is_left_out() -> None:
    fleet = Fleet()
    first, second = large(fleet, 1), large(fleet, 2)
    tried = choose(fleet).node
    assert tried is not None
    fleet.nodes[tried].unfit_until_s[KEY] = NOW_S + 1
    other = ({first.name, second.name} - {tried}).pop()
    assert choose(fleet, excluded={tried: "too_small: out of memory"}).node == other
    fleet.nodes[other].unfit_until_s[KEY] = NOW_S + 1
    decision = choose(fleet)
    assert (decision.node, set(why(decision).values())) == (None, {"was out of memory with this model"})


def test_once_it_is_in_memory_there_is_no_doubt() -> None:
    fleet = Fleet()
    held = large(fleet)
    assert choose(fleet).node == name(1)
    held.loaded_with[KEY] = ()
    held.resident[KEY] = resident(3)
    decision = choose(fleet)
    assert decision.chosen is not None
    assert (decision.chosen.notes, TOLD in decision.reason) == (("resident",), False)
