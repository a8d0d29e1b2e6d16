"""Who may serve a request, and that every exclusion says why; the same for every policy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.policies import POLICIES, decide
from proxy_addon.placement.view import WHOLE
from tests.proxy.placement.worlds import DAY, NOW_S, ask, name, node, report, resident, row


def _down(n: Node) -> None:
    n.poll_error = "it refused the connection"


def _unpolled(n: Node) -> None:
    n.polled_s = None


def _ejected(n: Node) -> None:
    n.health.failed(NOW_S, "reset", fatal=True)


def _coming_back(n: Node) -> None:
    n.health.failed(NOW_S - 100, "reset", fatal=True)
    n.take(ask(), NOW_S, 1.0)


def _leaving(n: Node) -> None:
    n.leaving = True


def _full(n: Node) -> None:
    n.full_until_s = NOW_S + 1


def _was_out_of_memory(n: Node) -> None:
    n.unfit_until_s["m"] = NOW_S + 1


def _other_version(n: Node) -> None:
    n.models["m"] = row(digest="old").model_copy(update={"modified_at": DAY - timedelta(days=1)})


def _without_model(n: Node) -> None:
    n.models.clear()


def _too_small(n: Node) -> None:
    n.report = report(gpu_gib=2, ram_gib=1)


CASES: list[tuple[Callable[[Node], None], str]] = [
    (_down, "is down: it refused the connection"),
    (_unpolled, "was not reached yet"),
    (_ejected, "is ejected for 2.0 s: reset"),
    (_coming_back, "is coming back and has its 1 in flight"),
    (_leaving, "is leaving the fleet"),
    (_full, "said that it is full"),
    (_was_out_of_memory, "was out of memory with this model"),
    (_other_version, "has another version of the model"),
    (_without_model, "does not have the model"),
    (_too_small, "does not fit: needs 5.5 GiB, has 2.6 GiB"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("harm", "why"), CASES, ids=[why for _, why in CASES])
def test_a_node_that_may_not_serve_is_left_out_and_the_reason_told(
    policy: str, harm: Callable[[Node], None], why: str
) -> None:
    fleet = Fleet()
    harm(node(fleet, 1))
    node(fleet, 2)
    decision = decide(ask(), fleet, Speeds(), NOW_S, policy)
    assert decision.node == name(2)
    assert {c.node: c.excluded for c in decision.candidates} == {name(1): why, name(2): None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [3, WHOLE + 10])
def test_nodes_that_were_tried_are_never_chosen_again(policy: str, size: int) -> None:
    fleet, speeds, tried = Fleet(), Speeds(), dict[str, str]()
    for number in range(size):
        node(fleet, number)
    while (chosen := decide(ask(), fleet, speeds, NOW_S, policy, tried).node) is not None:
        assert chosen not in tried
        tried[chosen] = "died: reset"
    assert len(tried) == size


def test_nobody_left_says_why() -> None:
    fleet = Fleet()
    node(fleet, 1)
    decision = decide(ask(), fleet, Speeds(), NOW_S, excluded={name(1): "died: reset"})
    assert decision.node is None
    assert decision.reason == "no node may serve it: 10.0.0.1:11434 died: reset"


def test_a_model_that_nobody_has() -> None:
    fleet = Fleet()
    node(fleet, 1)
    decision = decide(ask("other"), fleet, Speeds(), NOW_S)
    assert decision.node is None
    assert decision.reason == "no node has the model 'other'"
    assert decide(ask(), Fleet(), Speeds(), NOW_S).reason == "the fleet has no nodes"


def test_what_is_resident_needs_no_room() -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(gpu_gib=2, free_gib=0, ram_gib=1), resident={"m": resident()})
    assert decide(ask(), fleet, Speeds(), NOW_S).node == name(1)


def test_without_an_agent_a_node_is_assumed_to_have_room() -> None:
    fleet = Fleet()
    node(fleet, 1, report=None)
    decision = decide(ask(), fleet, Speeds(), NOW_S)
    assert decision.chosen is not None and "memory unknown: no agent" in decision.chosen.notes


def test_in_a_large_fleet_a_node_lost_since_the_last_look_is_not_chosen() -> None:
    fleet, speeds = Fleet(), Speeds()
    for number in range(WHOLE + 10):
        node(fleet, number)
    best = decide(ask(), fleet, speeds, NOW_S).node
    assert best is not None
    fleet.nodes[best].poll_error = "it refused the connection"
    assert decide(ask(), fleet, speeds, NOW_S + 0.1).node not in (best, None)


def test_in_a_large_fleet_everybody_is_looked_at_again_before_giving_up() -> None:
    fleet, speeds = Fleet(), Speeds()
    for number in range(WHOLE + 10):
        node(fleet, number, poll_error="it refused the connection")
    fleet.nodes[name(0)].poll_error = None
    assert decide(ask(), fleet, speeds, NOW_S).node == name(0)
    fleet.nodes[name(0)].poll_error, fleet.nodes[name(1)].poll_error = "it refused the connection", None
    assert decide(ask(), fleet, speeds, NOW_S + 0.1).node == name(1)
