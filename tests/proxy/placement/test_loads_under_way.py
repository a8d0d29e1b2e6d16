"""What placement knows of loads that nothing has shown yet: those that were sent, and those that will be."""

from __future__ import annotations

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import decide
from tests.proxy.placement.worlds import GIB, NOW_S, ask, node, report, resident, row


def house(gpu_gib: float = 16, free_gib: float = 11) -> tuple[Fleet, Node]:
    """A node that stores ``m``, ``small`` and ``large``, and has ``m`` in memory."""
    fleet = Fleet()
    models = {"m": row(), "small": row(2), "large": row(10)}
    told = report(gpu_gib=gpu_gib, free_gib=free_gib)
    return fleet, node(fleet, 0, models=models, resident={"m": resident()}, report=told, parallel=2)


def placed(fleet: Fleet, key: str, at_s: float = NOW_S) -> Decision:
    found = decide(ask(key), fleet, Speeds(), at_s)
    assert found.row is not None
    return found


def sent(fleet: Fleet, key: str) -> None:
    """A request for ``key`` goes where it was decided."""
    found = placed(fleet, key)
    assert found.row is not None
    only = fleet.nodes[found.row.node]
    only.take(
        ask(key),
        NOW_S,
        found.expected_s,
        load=found.row.load_s > 0,
        service_s=found.service_s,
        evicts=found.row.evicts,
        need_bytes=found.row.need_bytes,
    )
    only.loaded_with[key] = ()


def test_a_model_that_makes_room_for_a_load_is_not_ready_any_more() -> None:
    """Ollama would let it be used: each of these requests would keep the load waiting, and all behind it."""
    fleet, only = house()
    only.take(ask("m"), NOW_S, 5.0)
    assert placed(fleet, "m").row.load_s == 0  # type: ignore[union-attr]
    sent(fleet, "large")
    found = placed(fleet, "m", NOW_S + 0.5)
    assert found.chosen is not None
    assert found.chosen.terms["load_s"] > 0
    assert "makes room for a load under way" in found.chosen.notes


def test_what_is_being_loaded_takes_memory_that_no_report_shows_as_taken() -> None:
    fleet, _ = house(free_gib=11)
    before = placed(fleet, "large")
    assert before.row is not None
    assert before.row.evicts == ("m",)
    sent(fleet, "small")
    after = placed(fleet, "large")
    assert after.row is not None
    assert set(after.row.evicts) == {"m", "small"}


def test_who_shares_a_load_that_has_still_to_wait_waits_as_long() -> None:
    fleet, only = house()
    only.take(ask("m"), NOW_S, 30.0)
    first = placed(fleet, "large")
    assert first.row is not None
    assert first.wait_s > 20
    place = only.reserve(
        ask("large"),
        NOW_S,
        first.expected_s,
        True,
        first.service_s,
        first.row.evicts,
        first.row.need_bytes,
        first.wait_s,
    )
    second = placed(fleet, "large")
    assert second.wait_s >= first.wait_s
    place.cancel()
    assert only.in_use == {"m": 1}


def test_a_load_that_has_begun_is_shared_at_once() -> None:
    fleet, _ = house(free_gib=15)
    sent(fleet, "small")
    found = placed(fleet, "small", NOW_S + 0.1)
    assert found.wait_s == 0
    assert found.chosen is not None
    assert "shares a load under way" in found.chosen.notes


def test_need_is_told_with_the_load() -> None:
    fleet, _ = house(free_gib=15)
    found = placed(fleet, "small")
    assert found.row is not None
    assert found.row.need_bytes > 2 * GIB
    assert placed(fleet, "m").row.need_bytes == 0  # type: ignore[union-attr]
