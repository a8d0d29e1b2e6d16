"""Traces in virtual time: the same every time, whole, and true to the nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest

from proxy_addon.record import FinalStats
from tests.fakes.clock import clock_s
from tests.sim.blind import LeastConnections, RoundRobin
from tests.sim.hardware import LLAMA_8B, RTX_3090, RTX_4090
from tests.sim.oracle import Oracle
from tests.sim.ours import Ours
from tests.sim.trace import Arrival, Event, Trace
from tests.sim.traces import TRACES
from tests.sim.world import Balancer, Request, Result, play

EVERYBODY: dict[str, Callable[[], Balancer]] = {
    "oracle": Oracle,
    "least_conn": LeastConnections,
    "round_robin": RoundRobin,
    "ours": Ours,
}


def first(trace: Trace, count: int) -> Trace:
    """The beginning of a trace."""
    return replace(trace, arrivals=trace.arrivals[:count])


def essence(result: Result) -> list[tuple[object, ...]]:
    return [(o.arrival.id, o.node, o.ttft_s, o.total_s, o.tokens, o.failed) for o in result.outcomes]


@pytest.mark.parametrize("name", EVERYBODY)
def test_the_same_trace_ends_the_same_way(name: str) -> None:
    trace = first(TRACES["swap"](2), 60)
    assert essence(play(trace, EVERYBODY[name]())) == essence(play(trace, EVERYBODY[name]()))


@pytest.mark.parametrize("name", EVERYBODY)
@pytest.mark.parametrize("trace", ["chats", "embeddings", "fail_fast", "silent_cpu", "late_join"])
def test_every_request_is_answered_in_full(trace: str, name: str) -> None:
    found = play(first(TRACES[trace](1), 120), EVERYBODY[name]())
    assert not [o.arrival.id for o in found.outcomes if o.failed]
    assert all(o.tokens == o.arrival.output_tokens for o in found.outcomes)
    assert all(0 < o.ttft_s <= o.total_s for o in found.outcomes)


def test_knowing_all_is_better_than_counting() -> None:
    trace = first(TRACES["mixed"](1), 150)
    means = {n: fmean(o.total_s for o in play(trace, b()).outcomes) for n, b in EVERYBODY.items()}
    assert means["oracle"] < means["ours"] < means["least_conn"] < means["round_robin"]


@pytest.mark.parametrize("name", ["mixed", "contexts", "silent_cpu"])
def test_the_oracle_is_right(name: str) -> None:
    """Its model of the nodes says when each answer ends, to a hundredth of the mean answer."""
    told: dict[str, tuple[float, float]] = {}

    class Watched(Oracle):
        def ended(self, request: Request, stats: FinalStats) -> None:
            mind, id_ = self._mind, request.arrival.id
            assert mind is not None
            node = mind.nodes[mind._where[id_]]
            ahead = node if id_ in node.finished else node.copy()
            ahead.advance(math.inf, id_)
            told[id_] = ahead.finished[id_], clock_s()
            super().ended(request, stats)

    found = play(TRACES[name](1), Watched())
    off_s = [abs(said_s - true_s) for said_s, true_s in told.values()]
    assert len(told) == 300 and fmean(off_s) < 0.02 * fmean(o.total_s for o in found.outcomes)


def one(at_s: float, id_: str, prompt: str = "word " * 400, **more: object) -> Arrival:
    messages = ({"role": "user", "content": f"{prompt}[[id:{id_}]][[n:40]]"},)
    return Arrival(id_, at_s, "c", LLAMA_8B.name, messages, output_tokens=40, **more)  # type: ignore[arg-type]


def times(trace: Trace) -> list[float]:
    return [o.total_s for o in play(trace, Oracle()).outcomes]


def alone(*arrivals: Arrival, events: tuple[Event, ...] = ()) -> Trace:
    return Trace("one node", 1, (RTX_3090,), arrivals, events, warm=(LLAMA_8B,))


def test_a_node_that_turns_slow_takes_longer_until_it_recovers() -> None:
    events = (Event(50, 0, "slow", 5.0), Event(150, 0, "recover"))
    asked = [one(100.0 * n, f"x{n}", f"{n} " * 900) for n in range(3)]
    sound, slow, again = times(alone(*asked, events=events))
    assert slow == pytest.approx(5 * sound, rel=0.02) and again == pytest.approx(sound, rel=0.02)


def test_a_node_that_lost_its_gpu_says_so_and_is_slow_from_its_reload_on() -> None:
    shares: list[float] = []

    class Seen(Ours):
        def ended(self, request: Request, stats: FinalStats) -> None:
            resident = next(iter(self.fleet)).resident.values()
            shares.extend(row.size_vram / row.size for row in resident)
            super().ended(request, stats)

    trace = alone(one(0, "a", "a " * 900), one(100, "b", "b " * 900), events=(Event(50, 0, "lose_gpu"),))
    before, after = (o.total_s for o in play(trace, Seen()).outcomes)
    assert shares == [1.0, 0.0] and after > 10 * before


def test_a_node_that_joins_late_is_used_then_and_not_before() -> None:
    arrivals = tuple(one(0.25 * n, f"x{n}", f"{n} " * 900) for n in range(200))
    trace = Trace("joins", 1, (RTX_3090, RTX_4090), arrivals, (Event(25, 1, "join"),))
    found = play(trace, Ours()).outcomes
    assert {o.node for o in found if o.arrival.at_s + o.total_s < 25} == {0}
    assert {o.node for o in found if o.arrival.at_s > 25} == {0, 1}


def test_a_chat_that_comes_back_finds_its_answer_in_the_cache() -> None:
    trace = TRACES["chats"](1)
    turns = [a for a in trace.arrivals if a.id.startswith("1.")][:2]
    stats: list[FinalStats] = []

    class Seen(Oracle):
        def ended(self, request: Request, found: FinalStats) -> None:
            stats.append(found)
            super().ended(request, found)

    play(replace(trace, kinds=(RTX_3090,), arrivals=tuple(turns)), Seen())
    new = len(turns[1].messages[-1]["content"]) // 4
    assert (stats[0].prompt_tokens or 0) > 500 and (stats[1].prompt_tokens or 0) > 700
    speed = (stats[0].prompt_tokens or 0) / (stats[0].prefill_s or 1)
    assert (stats[1].prefill_s or 0) * speed == pytest.approx(new + 3, abs=6), "only the new turn is read"
