"""The line alone: nothing is lost, nobody starves, clients share, and what it shows is what it does."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_addon.admission.line import Item, Line, bound_s

AGEING_S = 10.0


def item(
    client: str = "a", priority: int = 5, at_s: float = 0.0, cost_s: float = 1.0, weight: float = 1.0
) -> Item:
    return Item(client=client, priority=priority, arrived_s=at_s, cost_s=cost_s, weight=weight)


def serve(line: Line[Item], now_s: float) -> Item:
    """Start whoever is next."""
    first = next(line.order(now_s))
    line.start(first, now_s)
    return first


ARRIVALS = st.tuples(st.sampled_from("abcd"), st.integers(1, 10), st.sampled_from([0.5, 1.0, 4.0]))
STEPS = st.lists(
    st.one_of(
        ARRIVALS,
        st.tuples(st.just("start"), st.integers(0, 30)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("return"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.floats(0.1, 40.0)),
    ),
    max_size=60,
)


def test_many_that_have_grown_old_do_not_hold_up_an_urgent_one() -> None:
    line = Line[Item](AGEING_S)
    for _ in range(500):
        line.add(item("many"), 0.0)
    for second in range(100):
        serve(line, float(second))
    line.add(urgent := item("urgent", 10, at_s=100.0), 100.0)
    assert line.position(urgent, 100.0) == 1


@given(STEPS)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_the_order_shown_is_the_order_kept(steps: list[tuple[Any, ...]]) -> None:
    """Against a plain set: who came and neither started nor left is in the line, once."""
    line, now_s = Line[Item](AGEING_S), 0.0
    waiting: list[Item] = []
    started: list[Item] = []
    for what, *rest in steps:
        if what == "wait":
            now_s += rest[0]
        elif what in ("start", "leave"):
            if not waiting:
                continue
            one = list(line.order(now_s))[rest[0] % len(waiting)]
            waiting.remove(one)
            if what == "start":
                line.start(one, now_s)
                started.append(one)
            else:
                assert line.remove(one, now_s)
                assert not line.remove(one, now_s)
        elif what == "return":
            if started:
                one = started.pop(rest[0] % len(started))
                line.add(one, now_s)
                waiting.append(one)
        else:
            one = item(what, rest[0], now_s, rest[1])
            line.add(one, now_s)
            waiting.append(one)
        shown = list(line.order(now_s))
        assert Counter(map(id, shown)) == Counter(map(id, waiting))
        assert len(line) == len(waiting)
        assert line.work_s == pytest.approx(sum(one.cost_s for one in waiting))
        assert +line.depth() == Counter(one.priority for one in waiting)
        flows = defaultdict(list)
        for one in shown:
            flows[one.client, one.priority].append((one.arrived_s, one.number))
        assert all(flow == sorted(flow) for flow in flows.values()), "out of order within a client"
    shown = list(line.order(now_s))
    assert [line.position(one, now_s) for one in shown] == list(range(1, len(shown) + 1))
    assert [serve(line, now_s) for _ in shown] == shown
    assert not len(line)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.integers(1, 10), st.floats(0.1, 8.0)), min_size=5, max_size=80
    ),
    st.floats(0.5, 6.0),
)
@settings(max_examples=300, deadline=None)
def test_no_head_is_overtaken_by_what_comes_after_its_bound(
    arrivals: list[tuple[str, int, float]], service_s: float
) -> None:
    """One server under a flood: whoever is started, no waiting head came its bound or more before it."""
    line, now_s, due_s = Line[Item](AGEING_S), 0.0, 0.0
    for client, priority, gap_s in arrivals:
        now_s += gap_s
        while due_s <= now_s and len(line):
            first = serve(line, due_s)
            due_s += service_s
            for head in line.order(now_s):
                if head.since_s is not None:
                    assert first.arrived_s <= head.since_s + bound_s(head.priority, AGEING_S)
        due_s = max(due_s, now_s)
        line.add(item(client, priority, now_s), now_s)


def test_a_batch_request_is_served_under_an_endless_flood_of_critical_ones() -> None:
    """Two critical ones for each that can be served, each from a client of its own."""
    line = Line[Item](AGEING_S)
    batch = item("batch", 1, 0.0)
    line.add(item("x", 10, 0.0), 0.0)
    line.add(batch, 0.0)
    served_s = None
    for second in range(1000):
        for half in (0.0, 0.5):
            line.add(item(f"c{second}-{half}", 10, second + half), second + half)
        if serve(line, second + 0.5) is batch:
            served_s = second + 0.5
            break
    assert served_s is not None
    # What came before the bound was there is served first; at two a second that takes twice as long.
    assert served_s <= 2 * bound_s(1, AGEING_S)


def test_ever_new_clients_do_not_hold_one_back_for_ever() -> None:
    """Each is owed its first request before the second of another, but not without end."""
    line, second = Line[Item](AGEING_S), item("a")
    line.add(item("a"), 0.0)
    line.add(second, 0.0)
    for number in range(10_000):
        line.add(item(f"n{number}", at_s=float(number)), float(number))
        if serve(line, float(number)) is second:
            break
    assert second.tag is not None
    assert number <= bound_s(5, AGEING_S)


@pytest.mark.parametrize(("later_s", "overtakes"), [(0.0, True), (30.0, True), (40.0, False), (90.0, False)])
def test_how_much_later_a_higher_priority_may_come(later_s: float, overtakes: bool) -> None:
    """Three priorities higher: within 3 × ageing_s it goes first, from 4 × ageing_s on it does not."""
    for phase_s in (0.0, 3.0, 9.9):
        line = Line[Item](AGEING_S)
        low, high = item("a", 5, phase_s), item("b", 8, phase_s + later_s)
        line.add(low, phase_s)
        line.add(high, phase_s + later_s)
        assert (next(line.order(phase_s + later_s)) is high) is overtakes


def test_five_hundred_requests_do_not_starve_one_however_old_they_are() -> None:
    line = Line[Item](AGEING_S)
    for _ in range(500):
        line.add(item("many"), 0.0)
    for second in range(45):  # well beyond ageing_s: what the five hundred have waited does not count
        serve(line, float(second))
    line.add(one := item("one", at_s=45.0), 45.0)
    assert line.position(one, 45.0) <= 2


COSTS = st.lists(st.floats(0.5, 4.0), min_size=30, max_size=30)


@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), COSTS), min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_clients_that_keep_waiting_share_by_weight(clients: list[tuple[float, list[float]]]) -> None:
    """Goyal, Vin, Cheng 1996, theorem 1: |W_f/w_f - W_g/w_g| ≤ c_f/w_f + c_g/w_g while both wait."""
    line = Line[Item](1e9)  # nothing ages
    for number, (weight, costs) in enumerate(clients):
        for cost_s in costs:
            line.add(item(str(number), cost_s=cost_s, weight=weight), 0.0)
    had = {str(number): 0.0 for number in range(len(clients))}
    left = Counter({str(number): len(costs) for number, (_, costs) in enumerate(clients)})
    share = {str(number): max(costs) / weight for number, (weight, costs) in enumerate(clients)}
    while min(left.values()) > 0:
        first = serve(line, 0.0)
        had[first.client] += first.cost_s / first.weight
        left[first.client] -= 1
        for one in had:
            for other in had:
                assert had[one] - had[other] <= share[one] + share[other] + 1e-6


def test_about_how_many_go_before_is_exact_where_clients_take_turns() -> None:
    line, items = Line[Item](AGEING_S), []
    for _ in range(7):
        for client in "abc":
            items.append(item(client, cost_s=2.0))
            line.add(items[-1], 0.0)
    line.add(urgent := item("d", 8, cost_s=3.0), 0.0)
    line.add(item("d", 2), 0.0)
    assert line.before(urgent) == (0, 0.0)
    for one in items:
        count, work_s = line.before(one)
        assert work_s == pytest.approx(3.0 + 2.0 * (count - 1))
        assert abs(count + 1 - line.position(one, 0.0)) <= 2  # within one turn of each client
    assert line.work_s == pytest.approx(sum(one.cost_s for one in line.order(0.0)))


def test_who_was_alone_and_used_much_is_not_punished_for_it() -> None:
    line = Line[Item](AGEING_S)
    for second in range(100):
        line.add(item("alone", at_s=float(second)), float(second))
        serve(line, float(second))
    for client in ("alone", "new", "alone", "new"):
        line.add(item(client, at_s=100.0), 100.0)
    assert [serve(line, 100.0).client for _ in range(4)] == ["alone", "new", "alone", "new"]


@given(st.lists(ARRIVALS, max_size=8), st.lists(ARRIVALS, min_size=1, max_size=4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_to_pass_by_an_empty_line_is_to_come_and_be_started(
    before: list[tuple[str, int, float]], after: list[tuple[str, int, float]], leaves: bool
) -> None:
    lines = Line[Item](AGEING_S), Line[Item](AGEING_S)
    for line in lines:
        come = [item(client, priority, 0.0, cost_s) for client, priority, cost_s in before]
        for one in come:
            line.add(one, 0.0)
        if leaves and come:
            line.remove(come[-1], 0.5)
        while len(line):
            serve(line, 1.0)
    one, other = item("a", at_s=2.0, cost_s=4.0), item("a", at_s=2.0, cost_s=4.0)
    lines[0].pass_by(one, 2.0)
    lines[1].add(other, 2.0)
    serve(lines[1], 2.0)
    assert (one.number, one.since_s, one.tag) == (other.number, other.since_s, other.tag)
    served = []
    for line, back in zip(lines, (one, other), strict=True):
        line.add(back, 3.0)  # its node failed
        for client, priority, cost_s in after:
            line.add(item(client, priority, 3.0, cost_s), 3.0)
        served.append([serve(line, 4.0).number for _ in range(len(line))])
    assert served[0] == served[1]


def test_who_joins_a_long_line_begins_where_it_is_and_not_before() -> None:
    """Neither is it owed what it did not ask for in the past."""
    line = Line[Item](AGEING_S)
    for _ in range(50):
        line.add(item("old"), 0.0)
    for _ in range(20):
        serve(line, 0.0)
    for _ in range(10):
        line.add(item("new"), 0.0)
    assert Counter(serve(line, 0.0).client for _ in range(10))["new"] == 5


def test_who_comes_back_to_a_long_line_is_not_owed_what_it_did_not_ask_for() -> None:
    line = Line[Item](AGEING_S)
    line.add(item("back", cost_s=5.0), 0.0)
    for _ in range(50):
        line.add(item("stayed"), 0.0)
    for _ in range(25):
        serve(line, 0.0)
    for _ in range(10):
        line.add(item("back"), 0.0)
    assert Counter(serve(line, 0.0).client for _ in range(10))["back"] == 5


def test_a_request_that_comes_back_stands_before_later_ones_and_is_not_charged_twice() -> None:
    line = Line[Item](AGEING_S)
    failed = item("a")
    line.add(failed, 0.0)
    for client in "abb":
        line.add(item(client), 0.0)
    assert serve(line, 1.0) is failed
    line.add(item("c", at_s=2.0), 2.0)
    line.add(failed, 3.0)
    assert next(line.order(3.0)) is failed
    serve(line, 3.0)
    assert [serve(line, 3.0).client for _ in range(4)] == ["b", "c", "a", "b"]


def test_who_leaves_the_line_costs_its_client_nothing() -> None:
    line = Line[Item](AGEING_S)
    dear = item("a", cost_s=100.0)
    line.add(dear, 0.0)
    line.add(mine := item("a"), 0.0)
    line.add(item("b"), 0.0)
    line.remove(dear, 0.0)
    assert line.position(mine, 0.0) <= 2
    assert {serve(line, 0.0).client for _ in range(2)} == {"a", "b"}


def test_clients_that_have_gone_are_forgotten() -> None:
    line = Line[Item](AGEING_S)
    line.add(item("resident"), 0.0)  # somebody always waits
    for number in range(5000):
        line.add(item(f"visitor {number}"), 0.0)
        line.add(item("resident"), 0.0)
        for one in list(islice(line.order(0.0), 2)):
            line.start(one, 0.0)
    assert sum(len(level.flows) for level in line._levels.values()) < 1000


def test_a_line_that_is_changed_while_it_is_looked_at() -> None:
    line = Line[Item](AGEING_S)
    items = [item(client) for client in "ab" * 5]
    for one in items:
        line.add(one, 0.0)
    seen = []
    for one in line.order(0.0):
        line.start(one, 0.0)
        seen.append(one)
    assert sorted(map(id, seen)) == sorted(map(id, items))
