"""Whole days in no time: unlike nodes whose true speeds are hidden, requests in turn and many at once."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.placement.policies import decide
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import NOW_S, ask, name, node, resident

PREFILL = 20.0  #: true prefill speed in decode speeds
PROMPT = 200


@dataclass
class Sim:
    """Nodes that decode one request at a time at speeds that only the simulation knows."""

    decode_tok_s: dict[str, float]
    fleet: Fleet = field(default_factory=Fleet)
    speeds: Speeds = field(default_factory=Speeds)
    placed: list[str] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    def service_s(self, n: Node, tokens: int) -> tuple[float, float]:
        tok_s = self.decode_tok_s[n.name]
        return PROMPT / (PREFILL * tok_s), tokens / tok_s

    def finish(self, flight: Flight, stats: FinalStats, now_s: float) -> None:
        concurrency, total_s = len(flight.node.flights), now_s - flight.started_s
        flight.drop()
        first_byte_s = total_s - (stats.decode_s or 0.0)
        self.speeds.observe(flight.node, ask(), stats, first_byte_s, total_s, concurrency, now_s)

    def run(self, arrivals: list[tuple[float, int]], policy: str = "finish_time") -> None:
        free_at = dict.fromkeys(self.fleet.nodes, 0.0)
        order = count()
        endings: list[tuple[float, int, Callable[[], None]]] = []
        for at_s, tokens in arrivals:
            while endings and endings[0][0] <= at_s:
                heapq.heappop(endings)[2]()
            decision = decide(ask(prompt_tokens=PROMPT), self.fleet, self.speeds, at_s, policy)
            assert decision.node is not None
            n = self.fleet.nodes[decision.node]
            flight = n.take(ask(), at_s, decision.expected_s, service_s=decision.service_s)
            prefill_s, decode_s = self.service_s(n, tokens)
            begin_s = max(at_s, free_at[n.name])
            end_s = free_at[n.name] = begin_s + prefill_s + decode_s
            self.placed.append(n.name)
            self.took_s.append(end_s - at_s)

            stats = FinalStats(PROMPT, tokens, 0.0, prefill_s, decode_s)
            ending: Callable[[], None] = partial(self.finish, flight, stats, end_s)
            heapq.heappush(endings, (end_s, next(order), ending))
        while endings:
            heapq.heappop(endings)[2]()


def sim(tok_s: list[float], agents: bool) -> Sim:
    found = Sim({name(number): speed for number, speed in enumerate(tok_s)})
    for number in range(len(tok_s)):
        n = node(found.fleet, number, resident={"m": resident()})
        if not agents:
            n.report = None
    return found


@pytest.mark.parametrize("agents", [True, False])
@pytest.mark.parametrize("tok_s", [[10, 30, 90], [90, 30, 10], [500, 800, 600]])
def test_a_few_requests_find_the_fastest_node(tok_s: list[float], agents: bool) -> None:
    world = sim(tok_s, agents)
    world.run([(NOW_S + 100.0 * turn, 100) for turn in range(12)])
    fastest = name(tok_s.index(max(tok_s)))
    assert world.placed[5:] == [fastest] * 7


def test_a_node_that_becomes_slow_is_left() -> None:
    world = sim([30, 90], agents=True)
    world.run([(NOW_S + 100.0 * turn, 100) for turn in range(6)])
    assert world.placed[-1] == name(1)
    world.decode_tok_s[name(1)] = 5
    world.run([(NOW_S + 1000 + 100.0 * turn, 100) for turn in range(12)])
    assert world.placed[-1] == name(0)


def test_speeds_survive_a_restart_of_the_proxy() -> None:
    world = sim([10, 30, 90], agents=False)
    world.run([(NOW_S + 100.0 * turn, 100) for turn in range(6)])
    again = Sim(world.decode_tok_s, world.fleet, Speeds.from_json(world.speeds.to_json()))
    again.run([(5.0, 100)])
    assert again.placed == [name(2)]


def test_under_load_it_is_near_to_who_knows_true_speeds_and_lengths() -> None:
    rng = random.Random(7)
    arrivals, at_s = [], NOW_S
    for _ in range(1500):
        at_s += rng.expovariate(1.0)
        arrivals.append((at_s, rng.randint(20, 180)))
    tok_s = [20.0, 40.0, 100.0]
    mean_s = {}
    for policy in ("finish_time", "least_loaded", "round_robin"):
        world = sim(tok_s, agents=True)
        world.run(arrivals, policy)
        mean_s[policy] = sum(world.took_s) / len(world.took_s)
        if policy == "finish_time":
            placed = Counter(world.placed)
            assert placed[name(2)] > placed[name(1)] > placed[name(0)] > 0
    assert mean_s["finish_time"] < 1.2 * clairvoyant_mean_s(arrivals, tok_s)
    assert mean_s["finish_time"] < mean_s["least_loaded"] < mean_s["round_robin"]


def clairvoyant_mean_s(arrivals: list[tuple[float, int]], tok_s: list[float]) -> float:
    """The mean time when each request goes where it truly ends first."""
    free_at, total_s = [0.0] * len(tok_s), 0.0
    for at_s, tokens in arrivals:
        ends = [
            max(at_s, free) + PROMPT / (PREFILL * speed) + tokens / speed
            for free, speed in zip(free_at, tok_s, strict=True)
        ]
        best = ends.index(min(ends))
        free_at[best] = ends[best]
        total_s += ends[best] - at_s
    return total_s / len(arrivals)
