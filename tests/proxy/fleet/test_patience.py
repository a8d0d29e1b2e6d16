"""Work that is late makes its node look slow while it is in flight; what has another reason does not."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.fleet.patience import LATE, MOST, overrun
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import NOW_S, ask, node

TOK_S = 50.0


def known(**fields: Any) -> tuple[Node, Speeds]:
    """A node of 50 tokens a second, whose answers have 100 tokens or a little more."""
    n, speeds = node(Fleet(), 1, **fields), Speeds()
    for _ in range(30):
        speeds.observe(n, ask(), FinalStats(200, 100, 0.0, 0.2, 100 / TOK_S), 0.2, 2.2, 1, NOW_S)
    return n, speeds


def fly(n: Node, wait_s: float = 0.0, **fields: Any) -> Flight:
    load = fields.pop("load", False)
    return n.take(ask(**fields), NOW_S, wait_s + 2.2, load=load, service_s=2.2)


def test_nothing_in_flight_and_nothing_late_are_in_time() -> None:
    n, speeds = known()
    assert overrun(n, speeds, NOW_S) == 1
    flight = fly(n)
    assert overrun(n, speeds, NOW_S + 1) == 1
    flight.answered(NOW_S + 1)
    assert overrun(n, speeds, NOW_S + 3) == 1


def test_a_first_byte_three_times_late_makes_the_node_three_times_slower() -> None:
    n, speeds = known()
    fly(n, wait_s=4.0)
    assert overrun(n, speeds, NOW_S + 12) == 1
    factors = [overrun(n, speeds, NOW_S + seconds) for seconds in (14, 30, 1000)]
    assert LATE <= factors[0] < factors[1] < factors[2] == MOST


def test_an_answer_that_outlasts_nearly_all_makes_the_node_slower() -> None:
    n, speeds = known()
    flight = fly(n)
    flight.answered(NOW_S + 1)
    longest_s = speeds.output(ask()).quantile(0.99) / TOK_S
    assert overrun(n, speeds, NOW_S + 1 + 0.9 * longest_s) == 1
    assert overrun(n, speeds, NOW_S + 1 + 4 * longest_s) == pytest.approx(4, rel=0.1)


def test_an_answer_that_may_be_long_is_given_time() -> None:
    n, speeds = known()
    for _ in range(30):
        speeds.observe(n, ask("m", client="long"), FinalStats(200, 4000, 0.0, 0.2, 80.0), 0.2, 80.0, 1, NOW_S)
    fly(n, client="long").answered(NOW_S + 1)
    assert overrun(n, speeds, NOW_S + 60) == 1


def test_who_waits_behind_an_answer_in_the_nodes_own_line_is_not_late() -> None:
    n, speeds = known()
    fly(n).answered(NOW_S + 0.1)
    fly(n)
    for _ in range(30):
        speeds.observe(n, ask(), FinalStats(200, 900, 0.0, 0.2, 900 / TOK_S), 0.2, 18.2, 1, NOW_S)
    assert overrun(n, speeds, NOW_S + 15) == 1, "who waits has expected to wait for a second"


def test_a_load_is_given_its_time() -> None:
    n, speeds = known()
    fly(n, load=True)
    assert overrun(n, speeds, NOW_S + 100) == 1


def test_an_answer_in_one_piece_is_given_the_time_of_all_of_it() -> None:
    n, speeds = known()
    fly(n, stream=False)
    longest_s = speeds.output(ask()).quantile(0.99) / TOK_S
    assert overrun(n, speeds, NOW_S + longest_s) == 1
    assert overrun(n, speeds, NOW_S + 5 * longest_s) > 2


def test_what_is_learned_meanwhile_does_not_excuse_what_is_late() -> None:
    n, speeds = known()
    fly(n, wait_s=4.0)
    before = overrun(n, speeds, NOW_S + 20)
    for _ in range(10):
        speeds.observe(n, ask(), FinalStats(200, 100, 0.0, 20, 100.0), 20, 120.0, 1, NOW_S)
    assert overrun(n, speeds, NOW_S + 20) == before > LATE
