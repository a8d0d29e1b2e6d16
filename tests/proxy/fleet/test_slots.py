"""How many a node serves at a time: seen where answers come side by side, tried where they might."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.fleet import slots
from proxy_addon.fleet.node import Fleet, Node
from tests.proxy.placement.worlds import NOW_S, ask, node


def fresh(**fields: Any) -> Node:
    return node(Fleet(), 1, **fields)


def side_by_side(n: Node, count: int, now_s: float = NOW_S, **asked: Any) -> None:
    """``count`` answers that all stream for a second at the same time."""
    flights = [n.take(ask(**asked), now_s, 1.0) for _ in range(count)]
    for flight in flights:
        flight.answered(now_s + 1)
    for flight in flights:
        flight.drop(10, now_s + 2)


def one_by_one(n: Node, count: int, now_s: float = NOW_S) -> None:
    """``count`` answers of a node with one slot: each begins when the one before has ended."""
    flights = [n.take(ask(), now_s, 1.0) for _ in range(count)]
    for turn, flight in enumerate(flights):
        flight.answered(now_s + turn + 0.1)
        flight.drop(10, now_s + turn + 1)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_answers_that_stream_side_by_side_are_served_side_by_side(count: int) -> None:
    n = fresh()
    side_by_side(n, count)
    assert n.parallel == count


def test_no_more_are_believed_than_are_looked_for() -> None:
    n = fresh()
    side_by_side(n, 40)
    assert n.parallel == slots.MOST


def test_requests_that_wait_for_each_other_show_one_slot() -> None:
    n = fresh()
    one_by_one(n, 5)
    assert n.parallel == 1


def test_a_first_piece_that_overtakes_a_last_one_shows_nothing() -> None:
    n = fresh()
    first, second = n.take(ask(), NOW_S, 1.0), n.take(ask(), NOW_S, 1.0)
    first.answered(NOW_S + 1)
    second.answered(NOW_S + 2)
    first.drop(10, NOW_S + 2.01)
    assert n.parallel == 1


@pytest.mark.parametrize("asked", [{"path": "/api/embed"}, {"stream": False}])
def test_what_does_not_stream_says_nothing(asked: dict[str, Any]) -> None:
    n = fresh()
    side_by_side(n, 3, **asked)
    assert n.parallel == 1


def test_different_models_have_slots_of_their_own() -> None:
    n = fresh()
    flights = [n.take(ask(key), NOW_S, 1.0) for key in ("m", "other")]
    for flight in flights:
        flight.answered(NOW_S + 1)
    for flight in flights:
        flight.drop(10, NOW_S + 2)
    assert n.parallel == 1


def test_what_the_configuration_says_is_neither_tried_nor_changed() -> None:
    n = fresh(parallel=2, parallel_known=True)
    assert slots.to_offer(n, NOW_S) == 2
    side_by_side(n, 4)
    assert n.parallel == 2


def test_one_more_is_offered_until_it_is_there_and_then_more_and_more_rarely() -> None:
    n = fresh()
    now_s, pauses = NOW_S, []
    for _ in range(8):
        assert slots.to_offer(n, now_s) == 2
        flights = [n.take(ask(), now_s, 1.0) for _ in range(2)]
        assert slots.to_offer(n, now_s) == 1, "one trial at a time"
        for turn, flight in enumerate(flights):
            flight.answered(now_s + turn + 0.1)
            flight.drop(10, now_s + turn + 1)
        waited_s = 3.0
        while slots.to_offer(n, now_s + waited_s) == 1:
            waited_s += 1.0
        pauses.append(waited_s)
        now_s += waited_s
    assert pauses == [30, 60, 120, 240, 480, 600, 600, 600]


def test_a_slot_that_was_found_lets_the_next_be_looked_for_at_once() -> None:
    n = fresh()
    for believed in (1, 2, 3):
        assert slots.to_offer(n, NOW_S + 10 * believed) == believed + 1
        side_by_side(n, believed + 1, NOW_S + 10 * believed)
    assert n.parallel == 4


def test_a_node_that_was_away_is_judged_anew() -> None:
    n, known = fresh(), fresh(parallel=3, parallel_known=True)
    side_by_side(n, 3)
    for each in (n, known):
        slots.restarted(each)
    assert (n.parallel, known.parallel) == (1, 3)
    assert slots.to_offer(n, NOW_S) == 2


@pytest.mark.parametrize(
    ("believed", "known", "told", "then"),
    [(1, False, 4, 4), (4, False, 1, 4), (1, False, None, 1), (2, True, 4, 2), (1, False, 1000, slots.MOST)],
    ids=["more", "a runner of one slot proves nothing", "none seen", "configured", "bounded"],
)
def test_an_agent_that_sees_a_runners_slots_is_believed(
    believed: int, known: bool, told: int | None, then: int
) -> None:
    n = fresh(parallel=believed, parallel_known=known)
    slots.reported(n, told)
    assert n.parallel == then
