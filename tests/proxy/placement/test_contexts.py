"""Clients that ask for one model under different options: each finds a node of its own and stays there.

Nodes are modelled as Ollama is: what a runner was loaded with serves that only, anything else reloads it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.measured import OfModel
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.policies import decide
from proxy_addon.prefix import prefix_of
from proxy_addon.prompt import parts_of
from tests.proxy.placement.worlds import NOW_S, ask, name, node, report, resident

DEFAULT_NUM_CTX = 4096  #: of the nodes, which have 8 GiB


@dataclass
class House:
    """Two nodes that hold the model under its default context, and what became of that."""

    fleet: Fleet = field(default_factory=Fleet)
    speeds: Speeds = field(default_factory=Speeds)
    loads: list[str] = field(default_factory=list)

    def serve(self, num_ctx: int | None, at_s: float) -> Node:
        """One request from its arrival to its end."""
        asked = ask(num_ctx=num_ctx)
        self.speeds.demand.note(asked, at_s)
        decision = decide(asked, self.fleet, self.speeds, at_s)
        assert decision.node is not None
        served_by = self.fleet.nodes[decision.node]
        assert decision.chosen is not None
        load = decision.chosen.terms["load_s"] > 0
        flight = served_by.take(asked, at_s, decision.expected_s, load=load, service_s=decision.service_s)
        served_by.loaded_with[asked.key] = asked.reload_key
        runner = resident(context=num_ctx or DEFAULT_NUM_CTX)
        if served_by.resident["m"].context_length != runner.context_length:
            assert load, "a reload that nobody has foreseen"
            self.loads.append(served_by.name)
            served_by.holds({"m": runner})
        flight.first_byte_s = at_s + 1
        flight.drop()
        served_by.holds(dict(served_by.resident))
        return served_by


def house(bandwidths: list[float]) -> House:
    found = House()
    for number, bandwidth in enumerate(bandwidths):
        node(found.fleet, number, resident={"m": resident()}, report=report(bandwidth=bandwidth))
    return found


@pytest.mark.parametrize("bandwidths", [[500e9, 500e9], [500e9, 700e9], [700e9, 500e9]])
@pytest.mark.parametrize("contexts", [(None, 8192), (DEFAULT_NUM_CTX, 8192), (2048, 8192)])
def test_each_of_two_contexts_settles_on_a_node(
    bandwidths: list[float], contexts: tuple[int | None, int | None]
) -> None:
    world, random_ = house(bandwidths), random.Random(4)
    homes: dict[int | None, list[str]] = {num_ctx: [] for num_ctx in contexts}
    for turn in range(60):
        num_ctx = random_.choice(contexts)
        homes[num_ctx].append(world.serve(num_ctx, NOW_S + 5.0 * turn).name)
    settled = {num_ctx: set(names[5:]) for num_ctx, names in homes.items()}
    assert all(len(names) == 1 for names in settled.values()), homes
    assert set.union(*settled.values()) == {name(0), name(1)}
    assert len(world.loads) <= 3


def test_options_that_mean_the_same_share_a_runner() -> None:
    world = house([500e9])
    for turn in range(6):
        world.serve((None, DEFAULT_NUM_CTX)[turn % 2], NOW_S + 5.0 * turn)
    assert world.loads == []


def test_a_cache_is_worth_nothing_where_the_model_must_be_loaded_anew() -> None:
    world = house([500e9])
    prefix = prefix_of(parts_of({"prompt": "x" * 800}))
    only = world.fleet.nodes[name(0)]
    only.loaded_with["m"] = ()
    only.take(ask(prefix=prefix), NOW_S, 1.0).drop()

    def expected(**more: Any) -> float:
        (row,) = decide(ask(prefix=prefix, **more), world.fleet, world.speeds, NOW_S).rows
        return row.cached_tokens

    assert expected() == 200
    assert expected(num_ctx=8192) == 0
    only.holds({})
    assert expected() == 0


def test_cached_tokens_are_counted_as_those_of_the_prompt_are() -> None:
    """A model whose tokens are shorter than the estimate has more of them, in the prompt and in its cache."""
    world = house([500e9])
    prefix = prefix_of(parts_of({"prompt": "x" * 800}))
    world.fleet.nodes[name(0)].take(ask(prefix=prefix), NOW_S, 1.0).drop()
    for _ in range(5):
        world.speeds.models.setdefault("m", OfModel()).prompt_ratio.add(2.0)
    decision = decide(ask(prefix=prefix), world.fleet, world.speeds, NOW_S)
    assert decision.ask is not None
    assert decision.rows[0].cached_tokens == pytest.approx(decision.ask.prompt_tokens)
    assert decision.ask.prompt_tokens > 300


@pytest.mark.parametrize("seen", [{}, {"m": resident(context=4096)}], ids=["no poll since", "polled before"])
def test_a_node_that_is_busy_under_other_options_is_not_taken_for_ready(seen: dict[str, Any]) -> None:
    """No poll has shown yet what the node loads for the request before; this one needs a load of its own."""
    fleet, speeds = Fleet(), Speeds()
    busy = node(fleet, 0, resident=seen, report=report())
    before = ask(num_ctx=8192)
    flight = busy.take(before, NOW_S, 5.0, load=True, service_s=1.0)
    busy.loaded_with["m"] = before.reload_key
    other, same = ask(num_ctx=4096), ask(num_ctx=8192)
    for answered in (False, True):
        if answered and seen:
            busy.holds({"m": resident(context=8192)})
        chosen = decide(other, fleet, speeds, NOW_S + 1).chosen
        assert chosen is not None
        assert chosen.terms["load_s"] > 0, chosen.notes
        chosen = decide(same, fleet, speeds, NOW_S + 1).chosen
        assert chosen is not None
        assert not any("reload" in note for note in chosen.notes)
        flight.answered(NOW_S + 0.5)
