"""How often a model is asked for: steady and fading rates, per options, and a bounded memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.fleet import demand as module
from proxy_addon.fleet.demand import HALF_LIFE_S, MAX_VARIANTS, SHORTEST_S, Demand
from tests.proxy.placement.worlds import NOW_S, ask


@pytest.mark.parametrize("seconds", [40, 120, 900])
@pytest.mark.parametrize("gap_s", [0.5, 2.0, 10.0])
def test_a_steady_rate_is_found_from_the_start(seconds: int, gap_s: float) -> None:
    demand = Demand()
    for number in range(int(seconds / gap_s)):
        demand.note(ask(), number * gap_s)
    assert demand.rate_per_s("m", (), seconds) == pytest.approx(1 / gap_s, rel=0.15)


def test_nobody_asks_for_what_nobody_asked_for() -> None:
    demand = Demand()
    demand.note(ask(unload=True, load_only=True), NOW_S)
    assert demand.rate_per_s("m", (), NOW_S) == 0
    assert demand.again_within("m", None, 60, NOW_S) == 0


def test_a_first_request_counts_as_one_in_half_a_minute() -> None:
    demand = Demand()
    demand.note(ask(), NOW_S)
    assert demand.rate_per_s("m", (), NOW_S) == pytest.approx(1 / SHORTEST_S, rel=0.1)


def test_demand_fades_by_half_in_each_half_life() -> None:
    demand = Demand()
    for _ in range(10):
        demand.note(ask(), NOW_S)
    later_s = NOW_S + 20 * HALF_LIFE_S  # long enough for its age not to matter
    halved = [demand.rate_per_s("m", (), later_s + n * HALF_LIFE_S) for n in range(3)]
    assert halved[1:] == pytest.approx([rate / 2 for rate in halved[:2]], rel=1e-3)


def test_options_are_told_apart_and_summed_up() -> None:
    demand = Demand()
    for key in (None, 8192, 8192):
        demand.note(ask(num_ctx=key), NOW_S)
    demand.note(ask(reload_key=(("num_gpu", ["not", "hashable"]),)), NOW_S)
    plain = demand.rate_per_s("m", (), NOW_S)
    assert demand.rate_per_s("m", (("num_ctx", 8192),), NOW_S) == pytest.approx(2 * plain)
    assert demand.rate_per_s("m", (("num_ctx", 4096),), NOW_S) == 0
    assert demand.rate_per_s("m", None, NOW_S) == pytest.approx(4 * plain)


@given(st.lists(st.floats(0, 1000), max_size=30), st.floats(0, 5000), st.floats(0, 5000))
def test_the_odds_of_another_request_are_odds(times: list[float], one_s: float, other_s: float) -> None:
    demand = Demand()
    for now_s in sorted(times):
        demand.note(ask(), now_s)
    near, far = sorted((one_s, other_s))
    odds = [demand.again_within("m", (), horizon_s, 1000) for horizon_s in (near, far)]
    assert 0 <= odds[0] <= odds[1] <= 1
    rate = demand.rate_per_s("m", (), 1000)
    assert odds[0] == pytest.approx(1 - math.exp(-rate * near))


def test_memory_is_bounded_whatever_clients_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MODELS", 10)
    demand = Demand()
    for number in range(40):
        demand.note(ask(f"made-up-{number}"), NOW_S)
        demand.note(ask("steady", num_ctx=number), NOW_S)
    assert len(demand._models) == 10
    assert len(demand._models["steady"]) == MAX_VARIANTS
    assert demand.rate_per_s("made-up-39", (), NOW_S) > 0
    assert demand.rate_per_s("made-up-0", (), NOW_S) == 0


def test_a_runner_with_layers_of_its_own_serves_also_those_that_name_none() -> None:
    demand = Demand()
    layers = (("num_ctx", 8192), ("num_gpu", 10))
    for _ in range(3):
        demand.note(ask(num_ctx=8192), NOW_S)
    demand.note(ask(reload_key=layers), NOW_S)
    alike = demand.rate_per_s("m", (("num_ctx", 8192),), NOW_S)
    assert demand.rate_per_s("m", layers, NOW_S) == pytest.approx(alike * 4 / 3)
    assert demand.rate_per_s("m", (("num_ctx", 4096), ("num_gpu", 10)), NOW_S) == 0
