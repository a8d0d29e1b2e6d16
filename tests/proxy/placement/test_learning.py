"""What is learned from answers, what it says of other models and nodes, and that it outlives a restart."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Estimate, Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import GIB, NOW_S, ask, name, node, report, resident, row

PROMISED_DECODE = 0.55 * 500e9 / (4 * GIB)
PROMISED_PREFILL = PROMISED_DECODE * 30


def estimate(speeds: Speeds, n: Node, key: str = "m") -> Estimate:
    return speeds.estimate(n.name, speeds.machine(n.name, n.report), key, n.models[key].size)


def answer(
    tok_s: float = 50.0,
    prefill_tok_s: float = 1000.0,
    tokens: int = 100,
    prompt: int = 200,
    load_s: float = 0.0,
) -> FinalStats:
    return FinalStats(prompt, tokens, load_s, prompt / prefill_tok_s, tokens / tok_s)


def observe(
    speeds: Speeds, n: Node, stats: FinalStats, asked: Ask | None = None, concurrency: int = 1
) -> None:
    speeds.observe(n, asked or ask(), stats, 0.5, 5.0, concurrency, NOW_S)


def test_before_anything_was_measured_the_hardware_promises() -> None:
    fleet, speeds = Fleet(), Speeds()
    gpu, unknown, cpu = node(fleet, 1), node(fleet, 2, report=None), node(fleet, 3, report=report(gpu_gib=0))
    assert estimate(speeds, gpu).decode_tok_s == pytest.approx(PROMISED_DECODE)
    assert estimate(speeds, gpu).prefill_tok_s == pytest.approx(PROMISED_PREFILL)
    rates = [estimate(speeds, n).decode_tok_s for n in (cpu, unknown, gpu)]
    assert rates == sorted(rates)


def test_a_measured_speed_replaces_the_promise() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    estimate(speeds, n)
    observe(speeds, n, answer(tok_s=20, prefill_tok_s=300, load_s=8.0))
    found = estimate(speeds, n)
    assert (found.decode_tok_s, found.prefill_tok_s) == pytest.approx((20, 300))
    assert found.load_s == pytest.approx(8)


def test_a_drift_in_steps_that_are_noise_each_is_followed() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    stamps = set()
    for step in range(60):
        observe(speeds, n, answer(tok_s=40 * 1.01**step))
        estimate(speeds, n)
        stamps.add(speeds.stamp(n.name))
    measured = speeds.nodes[n.name].models["m"].decode_tok_s.value
    assert estimate(speeds, n).decode_tok_s == pytest.approx(measured, rel=0.025)
    assert 2 < len(stamps) < 40, "told of, but not after each answer"


def test_what_one_model_taught_serves_the_nodes_other_models() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, models={"m": row(4), "big": row(8)})
    observe(speeds, n, answer(tok_s=PROMISED_DECODE / 2, load_s=4.0))
    found = estimate(speeds, n, "big")
    assert found.decode_tok_s == pytest.approx(PROMISED_DECODE / 4)
    assert found.load_s == pytest.approx(8)


def test_loads_of_other_nodes_say_more_of_a_new_one_than_the_prior_alone() -> None:
    fleet, speeds = Fleet(), Speeds()
    fast, new = node(fleet, 1), node(fleet, 2)
    size = fast.models["m"].size
    prior_s = estimate(speeds, new).load_s
    observe(speeds, fast, answer(load_s=prior_s / 16))
    assert estimate(speeds, fast).load_s == pytest.approx(prior_s / 16)
    assert estimate(speeds, new).load_s == pytest.approx(prior_s / 4)  # the mean of the logarithms
    assert estimate(Speeds.from_json(speeds.to_json()), new).load_s == pytest.approx(prior_s / 4)
    observe(speeds, new, answer(load_s=prior_s))
    assert estimate(speeds, new).load_s == pytest.approx(prior_s)
    assert estimate(speeds, new).load_bytes_s == pytest.approx(size / prior_s)


def test_an_unmeasured_node_counts_as_better_than_the_best_of_its_kind() -> None:
    fleet, speeds = Fleet(), Speeds()
    first, second = node(fleet, 1), node(fleet, 2)
    with_agent, without = node(fleet, 3), node(fleet, 4, report=None)
    neutral = estimate(speeds, without)
    observe(speeds, first, answer(tok_s=2 * PROMISED_DECODE))
    observe(speeds, second, answer(tok_s=PROMISED_DECODE / 2))
    assert estimate(speeds, with_agent).decode_tok_s == pytest.approx(1.5 * 2 * PROMISED_DECODE)
    assert estimate(speeds, without) == neutral


def test_a_new_agent_replaces_the_neutral_guess() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, report=None)
    before = estimate(speeds, n)
    n.report = report()
    assert estimate(speeds, n).decode_tok_s != before.decode_tok_s
    n.report = n.report.model_copy()
    assert estimate(speeds, n) is estimate(speeds, n)


def test_decoding_beside_others_is_brought_to_what_it_is_alone() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, parallel=3)
    observe(speeds, n, answer(tok_s=40), concurrency=3)
    assert estimate(speeds, n).decode_tok_s == pytest.approx(60)


def test_decoding_with_offload_is_brought_to_what_it_is_without() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, resident={"m": resident(on_gpu=0.5)})
    observe(speeds, n, answer(tok_s=10))
    slowdown = 0.5 + 0.5 * 500 / 40
    assert estimate(speeds, n).decode_tok_s == pytest.approx(10 * slowdown)


def test_prompts_from_the_prefix_cache_hardly_move_the_prefill_speed() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    observe(speeds, n, answer(prefill_tok_s=1000))
    for _ in range(5):
        observe(speeds, n, answer(prefill_tok_s=5000))
    assert 1000 < estimate(speeds, n).prefill_tok_s < 2000
    for _ in range(5):
        observe(speeds, n, answer(prefill_tok_s=1000))
    assert estimate(speeds, n).prefill_tok_s < 1200


def test_an_impossible_prefill_speed_is_no_measurement() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    observe(speeds, n, answer(tok_s=50, prefill_tok_s=1_000_000))
    assert estimate(speeds, n).prefill_tok_s == pytest.approx(PROMISED_PREFILL)


@pytest.mark.parametrize(("load_s", "concurrency"), [(0.05, 1), (8.0, 2), (None, 1)])
def test_what_was_no_load_or_waited_for_others_teaches_no_load_speed(
    load_s: float | None, concurrency: int
) -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    before = estimate(speeds, n).load_s
    stats = answer()
    stats.load_s = load_s
    observe(speeds, n, stats, concurrency=concurrency)
    assert estimate(speeds, n).load_s == before


def test_protocols_without_durations_teach_the_decode_speed_from_the_stream() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    speeds.observe(n, ask(), FinalStats(200, 91), first_byte_s=1.0, total_s=4.0, concurrency=1, now_s=NOW_S)
    assert estimate(speeds, n).decode_tok_s == pytest.approx(30)


def test_no_statistics_teach_no_speed() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    before = estimate(speeds, n)
    speeds.observe(n, ask(), None, 1.0, 2.0, 1, NOW_S)
    speeds.observe(n, ask(), FinalStats(), 1.0, 2.0, 1, NOW_S)
    assert estimate(speeds, n) == before


def test_output_length_is_learned_from_answers_and_capped_by_the_client() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    before = speeds.output_tokens(ask())
    for _ in range(10):
        observe(speeds, n, answer(tokens=1000))
    assert speeds.output_tokens(ask()) > 2 * before
    assert speeds.output_tokens(ask()) == speeds.output(ask()).mean
    assert speeds.output_tokens(ask(max_tokens=10)) == pytest.approx(10, abs=0.5)
    assert speeds.output_tokens(ask(path="/api/embed")) == 0


def test_a_file_of_before_lengths_were_distributions_is_read() -> None:
    old = b"""{"version": 1, "nodes": {"n": {"known": true, "decode": {"log": 1.0, "n": 3}, "models": {}}},
        "models": {"m": {"output_tokens": {"generate": {"value": 99.0, "n": 4}}, "sizes": {}}}}"""
    speeds = Speeds.from_json(old)
    assert speeds.nodes["n"].decode.n == 3
    assert speeds.output_tokens(ask()) == Speeds().output_tokens(ask())


def test_the_estimate_of_prompt_tokens_is_corrected_per_model() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    observe(speeds, n, answer(prompt=300))
    assert speeds.prompt_tokens(ask(prompt_tokens=1000)) == pytest.approx(1500)


def test_failures_lower_the_success_rate_and_fade() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    calm = 1 - speeds.success_rate(name(1), NOW_S)
    speeds.observe_failure(name(1), 3.0, NOW_S)
    shaken = 1 - speeds.success_rate(name(1), NOW_S)
    assert shaken > 5 * calm
    assert calm < 1 - speeds.success_rate(name(1), NOW_S + 600) < shaken
    assert speeds.lost_s(name(1)) == pytest.approx(4)
    for _ in range(50):
        observe(speeds, n, answer())
    assert 1 - speeds.success_rate(name(1), NOW_S) < shaken / 3


@given(st.lists(st.tuples(st.floats(1, 500), st.floats(10, 20_000), st.floats(0.1, 60)), max_size=8))
def test_a_restart_forgets_nothing(seen: list[tuple[float, float, float]]) -> None:
    speeds, n = Speeds(), node(Fleet(), 1, models={"m": row(), "other": row(2)})
    for tok_s, prefill_tok_s, load_s in seen:
        observe(speeds, n, answer(tok_s, prefill_tok_s, load_s=load_s))
        speeds.observe_failure(name(2), load_s, NOW_S)
    again = Speeds.from_json(speeds.to_json())
    assert again.to_json() == speeds.to_json()
    for key in n.models:
        assert estimate(again, n, key) == estimate(speeds, n, key)
    assert again.output_tokens(ask()) == pytest.approx(speeds.output_tokens(ask()))
    for other_clock_s in (0.0, 1e6):
        rate = again.success_rate(name(2), other_clock_s)
        assert rate == pytest.approx(speeds.success_rate(name(2), NOW_S))


def test_saved_speeds_are_loaded_again(tmp_path: Path) -> None:
    path, speeds = tmp_path / "state" / "speeds.json", Speeds()
    assert Speeds.load(path).to_json() == speeds.to_json()
    observe(speeds, node(Fleet(), 1), answer())
    speeds.save(path)
    assert Speeds.load(path).to_json() == speeds.to_json()
    assert [file.name for file in path.parent.iterdir()] == ["speeds.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2}',
        b'{"nodes": {"n": {"decode": {"log": "fast", "n": 1}}}}',
        b'{"nodes": {"n": {"decode": {"log": 1e9, "n": 1}}}}',
        b'{"nodes": {"n": {"outcomes": {"failures": NaN}}}}',
    ],
)
def test_a_broken_file_is_set_aside_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "speeds.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Speeds.load(path).to_json() == Speeds().to_json()
    assert (tmp_path / "speeds.json.broken").read_bytes() == content
    assert not path.exists()
    assert "are broken" in caplog.text and "learned anew" in caplog.text


def work(
    speeds: Speeds,
    n: Node,
    tok_s: float,
    times: int = 1,
    key: str = "m",
    beside: int = 0,
    runners: float = 0.0,
) -> None:
    for _ in range(times):
        speeds.observe(n, ask(key), answer(tok_s), 0.5, 5.0, 1 + beside, NOW_S, runners=runners)


def test_what_company_costs_is_learned_from_those_who_have_it() -> None:
    speeds, n, other = Speeds(), node(Fleet(), 1, parallel=8), node(Fleet(), 2, parallel=8)
    assert speeds.slowdown(n.name, 0) == 1
    before = speeds.slowdown(n.name, 3)
    for _ in range(40):
        work(speeds, n, 100)
        work(speeds, n, 100 / 1.3, beside=3)
    assert speeds.slowdown(n.name, 3) == pytest.approx(1.3, abs=0.05)
    assert speeds.slowdown(other.name, 3) == before
    assert estimate(speeds, n).decode_tok_s == pytest.approx(100, rel=0.02)


def test_what_other_models_at_work_cost_is_learned_apart_from_that() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, parallel=8)
    for _ in range(40):
        work(speeds, n, 100)
        work(speeds, n, 90, runners=1)
    assert speeds.slowdown(n.name, 0, 1) == pytest.approx(100 / 90, abs=0.05)
    assert speeds.slowdown(n.name, 2) == Speeds().slowdown(n.name, 2)


@given(beside=st.floats(0, 15), runners=st.floats(0, 4), seen=st.lists(st.floats(1, 1000), max_size=20))
def test_company_never_helps(beside: float, runners: float, seen: list[float]) -> None:
    speeds, n = Speeds(), node(Fleet(), 1, parallel=16)
    for tok_s in seen:
        work(speeds, n, tok_s, beside=round(beside), runners=runners)
    assert speeds.slowdown(n.name, beside, runners) >= speeds.slowdown(n.name, beside) >= 1
    assert speeds.slowdown(n.name, beside) <= 1 + beside, "a batch is not slower than one after the other"


def test_prefill_is_learned_from_what_was_evaluated() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    whole, cached = answer(prefill_tok_s=1000, prompt=2000), FinalStats(2000, 100, 0.0, 0.2, 2.0)
    for _ in range(20):
        for stats, tokens in ((whole, 0), (cached, 1800)):  # 200 of 2000 are evaluated in 0.2 s
            asked = ask(prompt_tokens=2000)
            speeds.observe(n, asked, stats, 0.5, 5.0, 1, NOW_S, cached_tokens=tokens)
    assert estimate(speeds, n).prefill_tok_s == pytest.approx(1000, rel=0.05)


def test_a_count_without_the_cached_tokens_does_not_make_prefill_look_slow() -> None:
    """Some count what they evaluated only: to take the cached ones off it once more would be wrong."""
    speeds, n = Speeds(), node(Fleet(), 1)
    whole, rest = answer(prefill_tok_s=1000, prompt=2000), FinalStats(1000, 100, 0.0, 1.0, 2.0)
    for stats, tokens in [(whole, 0)] * 3 + [(rest, 1000)] * 20:
        speeds.observe(n, ask(prompt_tokens=2000), stats, 0.5, 5.0, 1, NOW_S, cached_tokens=tokens)
    assert estimate(speeds, n).prefill_tok_s == pytest.approx(1000, rel=0.05)


def test_a_load_is_learned_from_who_waited_for_nobody_else() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    before = estimate(speeds, n).load_s
    speeds.observe(n, ask(), answer(load_s=8.0), 0.5, 5.0, 1, NOW_S, lone=False)
    assert estimate(speeds, n).load_s == before
    speeds.observe(n, ask(), answer(load_s=8.0), 0.5, 5.0, 1.5, NOW_S, lone=True)
    assert estimate(speeds, n).load_s == pytest.approx(8)


def test_a_node_that_turned_slow_is_believed_after_two_answers_with_all_its_models() -> None:
    speeds, n = Speeds(), node(Fleet(), 1, models={"m": row(4), "big": row(8)})
    work(speeds, n, 100, 10)
    work(speeds, n, 40, 10, "big")
    assert speeds.doubt(n.name, NOW_S) is None
    work(speeds, n, 20, 2)
    assert estimate(speeds, n).decode_tok_s == pytest.approx(20, rel=0.05)
    assert estimate(speeds, n, "big").decode_tok_s == pytest.approx(8, rel=0.1), "nobody had to find out"
    assert speeds.doubt(n.name, NOW_S) == "slow"
    work(speeds, n, 100, 2)
    assert estimate(speeds, n).decode_tok_s == pytest.approx(100, rel=0.05)
    assert estimate(speeds, n, "big").decode_tok_s == pytest.approx(40, rel=0.1)
    assert speeds.doubt(n.name, NOW_S) is None


def test_one_slow_answer_does_not_make_a_slow_node() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    work(speeds, n, 100, 10)
    work(speeds, n, 10)
    work(speeds, n, 100)
    assert estimate(speeds, n).decode_tok_s > 60
    assert speeds.doubt(n.name, NOW_S) is None


def test_prefill_that_fell_comes_back_with_decoding() -> None:
    """A try of a few tokens measures decoding alone; what slowed both has ended for both."""
    speeds, n = Speeds(), node(Fleet(), 1)

    def prefill(tok_s: float, prefill_tok_s: float, times: int) -> None:
        for _ in range(times):
            stats = answer(tok_s, prefill_tok_s, prompt=2000)
            speeds.observe(n, ask(prompt_tokens=2000), stats, 0.5, 5.0, 1, NOW_S, cached_tokens=0)

    prefill(100, 3000, 10)
    prefill(20, 600, 3)
    assert estimate(speeds, n).prefill_tok_s == pytest.approx(600, rel=0.1)
    for _ in range(2):
        speeds.observe(n, ask(), FinalStats(4, 8, 0.0, 0.01, 0.08), 0.1, 0.1, 1, NOW_S, probe=True)
    assert estimate(speeds, n).decode_tok_s == pytest.approx(100, rel=0.05)
    assert estimate(speeds, n).prefill_tok_s == pytest.approx(3000, rel=0.1)


def test_a_try_of_the_proxys_own_teaches_nothing_of_clients() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    before = speeds.output_tokens(ask()), speeds.prompt_tokens(ask())
    speeds.observe(n, ask(), answer(tokens=8, prompt=999), 0.1, 0.2, 1, NOW_S, probe=True)
    assert (speeds.output_tokens(ask()), speeds.prompt_tokens(ask())) == before
    assert speeds.has_decoded(n.name, "m")


def test_a_node_that_fails_is_in_doubt_until_it_has_worked_for_a_while() -> None:
    speeds, n = Speeds(), node(Fleet(), 1)
    for _ in range(3):
        speeds.observe_failure(n.name, 0.1, NOW_S)
    assert speeds.doubt(n.name, NOW_S) == "failing"
    work(speeds, n, 50, 20)
    assert speeds.doubt(n.name, NOW_S) is None
