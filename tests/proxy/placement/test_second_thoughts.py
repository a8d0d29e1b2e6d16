"""Whether an unanswered request had better be done elsewhere: what is left of it where it is."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.placement.features import Features
from proxy_addon.placement.policies import decide
from proxy_addon.placement.second_thoughts import Left, left_here, worth_moving
from tests.proxy.placement.worlds import NOW_S, ask, node, resident, told


@pytest.mark.parametrize(
    ("left_s", "elsewhere_s", "moves"),
    [
        (97.0, 8.0, True),
        (10.0, 4.9, True),
        (10.0, 5.0, False),  # not clearly better
        (10.0, 12.0, False),
        (3.0, 1.1, False),  # two seconds must be gained
        (3.0, 0.9, True),
        (5.0, float("inf"), False),
    ],
)
def test_a_request_moves_only_for_what_is_clearly_better(
    left_s: float, elsewhere_s: float, moves: bool
) -> None:
    assert worth_moving(left_s, elsewhere_s) is moves


class World:
    """One node, and requests that are sent there."""

    def __init__(self, **fields: Any) -> None:
        self.fleet, self.speeds = Fleet(), Speeds()
        self.node: Node = node(self.fleet, 1, **fields)

    def send(self, now_s: float = NOW_S, request: Ask | None = None) -> tuple[Flight, Features]:
        request = request or ask()
        decision = decide(request, self.fleet, self.speeds, now_s)
        row = decision.row
        assert row is not None
        flight = self.node.take(
            request, now_s, decision.expected_s, row.load_s > 0, decision.service_s, self.node.parallel
        )
        self.node.loaded_with[request.key] = request.reload_key
        return flight, row

    def left(self, sent: tuple[Flight, Features], now_s: float) -> Left:
        left = left_here(*sent, self.fleet, self.speeds, now_s)
        assert left is not None
        return left


def test_what_is_left_of_a_load_under_way_is_what_was_expected_less_what_has_passed() -> None:
    world = World()
    sent = world.send()
    left = world.left(sent, NOW_S + 0.5)
    assert left.seconds == pytest.approx(sent[0].expected_s - 0.5)
    assert left.why == "is still loading m"


def test_a_load_that_takes_longer_will_take_longer_still() -> None:
    world = World()
    sent = world.send()
    late_s = NOW_S + 20 * sent[0].expected_s
    assert world.left(sent, late_s).seconds > 4 * sent[0].expected_s


def test_a_model_that_ends_on_the_cpu_takes_as_long_as_its_cpu() -> None:
    world = World()
    sent = world.send()
    world.node.holds({"m": resident(on_gpu=1.0)})
    sound = world.left(sent, NOW_S + 1)
    world.node.holds({"m": resident(on_gpu=0.0)})
    left = world.left(sent, NOW_S + 1)
    assert left.seconds > 5 * sound.seconds
    assert left.why == "runs 100% of m on its CPU"


def test_a_node_that_answers_too_late_takes_so_much_longer_for_the_answer_as_well() -> None:
    world = World(resident={"m": resident()})
    sent = world.send()
    in_time = world.left(sent, NOW_S + 0.1)
    late = world.left(sent, NOW_S + 10)
    assert late.seconds > 5 * in_time.seconds
    assert "times as long as expected" in late.why


def test_of_an_answer_in_one_piece_only_what_is_not_done_yet_is_left() -> None:
    world = World(resident={"m": resident(on_gpu=0.0)})
    whole, stream = world.send(request=ask(stream=False)), World(resident={"m": resident(on_gpu=0.0)})
    streamed = stream.send()
    half_s = NOW_S + whole[0].expected_s / 2
    assert world.left(whole, half_s).seconds == pytest.approx(whole[0].expected_s / 2, rel=0.05)
    # A stream that has not begun by then has all of its tokens before it.
    assert stream.left(streamed, half_s).seconds > whole[0].expected_s


def test_those_that_came_later_do_not_count_and_those_before_do() -> None:
    world = World(resident={"m": resident()})
    first = world.send()
    second = world.send(NOW_S + 0.1)
    alone = world.left(first, NOW_S + 0.2).seconds
    assert world.left(second, NOW_S + 0.2).seconds > 1.5 * alone
    second[0].drop()
    assert world.left(first, NOW_S + 0.2).seconds == pytest.approx(alone)


def test_a_look_leaves_everything_as_it_was() -> None:
    world = World(resident={"m": resident()})
    first, _ = world.send(), world.send(NOW_S + 0.1)
    before = told(decide(ask(), world.fleet, world.speeds, NOW_S + 1))
    flights, in_use, work_s = set(world.node.flights), dict(world.node.in_use), world.node.work_s
    world.left(first, NOW_S + 1)
    assert (world.node.flights, dict(world.node.in_use), world.node.work_s) == (flights, in_use, work_s)
    assert told(decide(ask(), world.fleet, world.speeds, NOW_S + 1)) == before


def test_of_a_node_that_may_be_sent_nothing_nothing_is_said() -> None:
    world = World(resident={"m": resident()})
    sent = world.send()
    world.node.full_until_s = NOW_S + 10
    assert left_here(*sent, world.fleet, world.speeds, NOW_S + 1) is None
