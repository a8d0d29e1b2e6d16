"""What a request ran beside, as a mean over its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.fleet.node import Fleet, Flight
from tests.proxy.placement.worlds import NOW_S, ask, node


def test_a_request_alone_has_no_company() -> None:
    n = node(Fleet(), 1, parallel=4)
    flight = n.take(ask(), NOW_S, 1.0)
    flight.answered(NOW_S + 1)
    assert flight.company(NOW_S + 3) == (1.0, 0.0)
    assert flight.lone


def test_company_counts_for_as_long_as_it_stays() -> None:
    n = node(Fleet(), 1, parallel=4)
    first = n.take(ask(), NOW_S, 1.0)
    first.answered(NOW_S)
    second = n.take(ask(), NOW_S + 3, 1.0)
    second.answered(NOW_S + 4)
    second.drop(0, NOW_S + 6)
    other = n.take(ask("other"), NOW_S + 7, 1.0)
    other.answered(NOW_S + 8)
    sequences, runners = first.company(NOW_S + 10)
    assert sequences == pytest.approx(1 + 2 / 10)
    assert runners == pytest.approx(2 / 10)
    other.drop(0, NOW_S + 10)
    first.drop(0, NOW_S + 10)


def test_what_happened_before_the_first_byte_is_not_beside_the_answer() -> None:
    n = node(Fleet(), 1, parallel=2)
    before = n.take(ask(), NOW_S, 1.0)
    flight = n.take(ask(), NOW_S, 1.0)
    before.drop(0, NOW_S + 5)
    flight.answered(NOW_S + 5)
    assert flight.company(NOW_S + 9).sequences == pytest.approx(1)
    assert not flight.lone
    whole = n.take(ask(stream=False), NOW_S + 9, 1.0)
    flight.drop(0, NOW_S + 10)
    whole.answered(NOW_S + 11)
    assert whole.company(NOW_S + 11).sequences == pytest.approx(1.5), "its answer came while it waited"


def test_who_waits_for_a_load_or_a_slot_is_not_at_work() -> None:
    n = node(Fleet(), 1, parallel=2)
    flight = n.take(ask(), NOW_S, 1.0)
    flight.answered(NOW_S)
    n.take(ask(), NOW_S, 1.0)
    n.take(ask("other"), NOW_S, 1.0, load=True)
    n.take(ask("third", stream=False), NOW_S, 1.0, load=True)
    assert flight.company(NOW_S + 5) == (1.0, 0.0)
    n.take(ask("in one piece", stream=False), NOW_S + 5, 1.0)
    assert flight.company(NOW_S + 10) == (1.0, pytest.approx(0.5))


def test_only_as_many_are_decoded_as_there_are_slots() -> None:
    n = node(Fleet(), 1, parallel=2)
    flights = [n.take(ask(), NOW_S, 1.0) for _ in range(5)]
    for flight in flights:
        flight.answered(NOW_S)
    assert flights[0].company(NOW_S + 5).sequences == pytest.approx(2)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.sampled_from("ab")), max_size=30))
def test_the_mean_is_that_of_the_counts(steps: list[tuple[float, bool, str]]) -> None:
    n = node(Fleet(), 1, parallel=3, parallel_known=True)
    watched = n.take(ask("a"), NOW_S, 1.0)
    watched.answered(NOW_S)
    now_s, area, others = NOW_S, 0.0, 0.0
    flights: list[Flight] = []
    for passed_s, comes, key in [*steps, (1.0, True, "a")]:
        now_s += passed_s
        area += passed_s * min(1 + sum(f.ask.key == "a" for f in flights), 3)
        others += passed_s * any(f.ask.key == "b" for f in flights)
        if comes:
            flights.append(n.take(ask(key), now_s, 1.0))
            flights[-1].answered(now_s)
        elif flights:
            flights.pop().drop(0, now_s)
    sequences, runners = watched.company(now_s)
    assert sequences == pytest.approx(area / (now_s - NOW_S))
    assert runners == pytest.approx(others / (now_s - NOW_S))
