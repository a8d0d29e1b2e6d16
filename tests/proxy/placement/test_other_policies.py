"""The founding document's score with its worked example, and the two simple policies."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.policies import decide
from proxy_addon.placement.seed_score import Factors, factors
from tests.proxy.placement.worlds import NOW_S, ask, name, node, report, resident

A = Factors(0.98, 0.120, 0.2, 8, 8, gpu_wanted=True, gpu_free=True)
B = Factors(0.99, 0.080, 0.1, 8, 8, gpu_wanted=True, gpu_free=False)


def test_the_documents_worked_example() -> None:
    # It prints 109.3 and 83.5; its own factors multiply out to these.
    assert A.score() == pytest.approx(100 * 0.98 / 1.12 * 1.5 / 1.2) == pytest.approx(109.375)
    assert B.score() == pytest.approx(100 * 0.99 / 1.08 / 1.1) == pytest.approx(83.333, abs=1e-3)


@pytest.mark.parametrize(
    ("found", "score"),
    [
        (Factors(latency_s=0), 100),
        (Factors(latency_s=0, success_rate=0.8), 80),
        (Factors(latency_s=0.25), 80),
        (Factors(latency_s=0, load=1.0), 50),
        (Factors(latency_s=0, priority=1, task_priority=6), 100 / 1.5),
        (Factors(latency_s=0, specialised=True), 120),
        (Factors(latency_s=0, gpu_wanted=True), 100),
        (Factors(latency_s=0, gpu_free=True), 100),
    ],
)
def test_each_factor(found: Factors, score: float) -> None:
    assert found.score() == pytest.approx(score)


def test_factors_come_from_what_is_known_of_node_and_ask() -> None:
    fleet, speeds = Fleet(), Speeds()
    n = node(fleet, 1, poll_latency_s=0.12, parallel=2, priority=8, preferred_tasks=frozenset({"generation"}))
    n.take(ask(), NOW_S, 1.0)

    def found(**more: Any) -> Factors:
        decision = decide(ask(**more), fleet, speeds, NOW_S, "score")
        assert decision.ask is not None and decision.row is not None
        return factors(decision.ask, decision.row)

    assert found(prompt_tokens=100, priority=7) == Factors(
        0.99, 0.12, 0.5, 8, 7, gpu_wanted=True, gpu_free=True, specialised=True
    )
    assert not found(prompt_tokens=99).gpu_wanted
    assert found(prompt_tokens=99, requires_gpu=True).gpu_wanted
    assert not found(path="/api/embed", prompt_tokens=999).gpu_wanted


def test_score_chooses_the_highest_and_says_it() -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(gpu_gib=0), poll_latency_s=0.08)
    node(fleet, 2, poll_latency_s=0.12)
    decision = decide(ask(), fleet, Speeds(), NOW_S, "score")
    assert decision.node == name(2)
    assert decision.reason == "10.0.0.2:11434 has the highest score, 132.6"
    assert decision.expected_s == 0


def test_least_loaded_counts_per_slot() -> None:
    fleet = Fleet()
    one, four = node(fleet, 1, resident={"m": resident()}), node(fleet, 2, parallel=4)
    one.take(ask(), NOW_S, 1.0)
    for _ in range(3):
        four.take(ask(), NOW_S, 1.0)
    assert decide(ask(), fleet, Speeds(), NOW_S, "least_loaded").node == name(2)
    four.take(ask(), NOW_S, 1.0)
    four.take(ask(), NOW_S, 1.0)
    assert decide(ask(), fleet, Speeds(), NOW_S, "least_loaded").node == name(1)


def test_round_robin_goes_round_whatever_the_load() -> None:
    fleet, speeds, order = Fleet(), Speeds(), []
    for number in (1, 2, 3):
        node(fleet, number)
    for _ in range(7):
        chosen = decide(ask(), fleet, speeds, NOW_S, "round_robin").node
        assert chosen is not None
        fleet.nodes[chosen].take(ask(), NOW_S, 1.0)
        order.append(chosen)
    assert order == [name(number) for number in (1, 2, 3, 1, 2, 3, 1)]


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(KeyError):
        decide(ask(), Fleet(), Speeds(), NOW_S, "best")
