"""A node turns slow or fails, and is sound again: how many requests pay for it, and who finds out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.probe import TOKENS, Schedule
from proxy_addon.placement.policies import decide
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import NOW_S, ask, name, node, resident

PROMPT, OUTPUT = 200, 100
GAP_S = 10.0  #: between two requests: each finds all nodes idle
GOOD, FAIR = name(1), name(2)


@dataclass
class World:
    """Two nodes with true speeds that only the world knows, and a client with one request at a time."""

    tok_s: dict[str, float] = field(default_factory=lambda: {GOOD: 100.0, FAIR: 50.0})
    fails: set[str] = field(default_factory=set)
    fleet: Fleet = field(default_factory=Fleet)
    speeds: Speeds = field(default_factory=Speeds)
    schedule: Schedule = field(default_factory=Schedule)
    now_s: float = NOW_S
    tried: list[float] = field(default_factory=list)  #: when nodes were tried by the proxy itself

    def __post_init__(self) -> None:
        for number in (1, 2):
            node(self.fleet, number, resident={"m": resident()}, loaded_with={"m": ()})

    def outcome(self, n: Node, tokens: int, probe: bool = False) -> float:
        """What ``n`` makes of a request; the seconds that it takes."""
        if n.name in self.fails:
            self.speeds.observe_failure(n.name, 1.0, self.now_s)
            return 1.0
        tok_s = self.tok_s[n.name]
        stats = FinalStats(4 if probe else PROMPT, tokens, 0.0, PROMPT / (20 * tok_s), tokens / tok_s)
        took_s = PROMPT / (20 * tok_s) + tokens / tok_s
        self.speeds.observe(n, ask(), stats, 0.1, took_s, 1, self.now_s, probe=probe)
        return took_s

    def run(self, requests: int) -> list[str]:
        """Where the next ``requests`` of the client go; between them nodes in doubt are tried."""
        placed = []
        for _ in range(requests):
            self.speeds.demand.note(ask(), self.now_s)
            excluded: dict[str, str] = {}
            while True:
                chosen = decide(
                    ask(prompt_tokens=PROMPT), self.fleet, self.speeds, self.now_s, excluded=excluded
                )
                assert chosen.node is not None
                placed.append(chosen.node)
                self.outcome(self.fleet.nodes[chosen.node], OUTPUT)
                if chosen.node not in self.fails:
                    break
                excluded[chosen.node] = "failed"
            for second in range(int(GAP_S)):
                for n, _, doubt in self.schedule.due(self.fleet, self.speeds, self.now_s + second):
                    self.tried.append(self.now_s + second)
                    self.outcome(n, TOKENS, probe=True)
                    better = doubt == "failing" or self.speeds.surprised(n.name, "m")
                    better = better and n.name not in self.fails
                    self.schedule.tried(n.name, self.now_s + second, better)
            self.now_s += GAP_S
        return placed


@pytest.fixture
def settled() -> World:
    world = World()
    world.run(12)
    assert world.run(3) == [GOOD] * 3
    assert not world.tried
    return world


@pytest.mark.parametrize("factor", [3, 5, 20])
def test_two_requests_show_that_a_node_has_turned_slow(settled: World, factor: float) -> None:
    settled.tok_s[GOOD] /= factor
    assert settled.run(6) == [GOOD] * 2 + [FAIR] * 4


@pytest.mark.parametrize("factor", [3, 5, 20])
def test_once_it_has_recovered_it_is_used_again_and_no_client_had_to_find_out(
    settled: World, factor: float
) -> None:
    settled.tok_s[GOOD] /= factor
    settled.run(30)
    assert len(settled.tried) <= 6, "the longer in vain, the more rarely"
    settled.tok_s[GOOD] *= factor
    after = settled.run(34)
    back = after.index(GOOD)
    assert back * GAP_S <= 300 + GAP_S, "as long as the longest pause"
    assert set(after[:back]) == {FAIR}
    assert set(after[back:]) == {GOOD}


def test_it_is_found_out_within_seconds_where_it_was_slow_for_a_moment_only(settled: World) -> None:
    settled.tok_s[GOOD] /= 5
    settled.run(2)
    settled.tok_s[GOOD] *= 5
    assert settled.run(6).index(GOOD) <= 3


def test_a_node_that_fails_is_left_and_used_again_once_it_works(settled: World) -> None:
    settled.fails.add(GOOD)
    during = settled.run(30)
    assert during.count(GOOD) < 12
    settled.fails.clear()
    after = settled.run(60)
    assert after[-20:] == [GOOD] * 20
