"""What a choice costs beyond the request itself, and what makes it cheaper: each term, and what follows."""

from __future__ import annotations

from collections import Counter

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.finish_time import NEIGHBOURS, RISK, TERMS
from proxy_addon.placement.policies import POLICIES, choose, decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.survey import KEPT_S, LOADED_AGAIN
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import GIB, NOW_S, ask, name, node, report, resident, row

CHAT = ((b"system", 50), (b"turn 1", 150))


def candidate(
    fleet: Fleet,
    number: int = 1,
    asked: Ask | None = None,
    speeds: Speeds | None = None,
    rules: Rules | None = None,
) -> Candidate:
    decision = decide(asked or ask(), fleet, speeds or Speeds(), NOW_S, rules=rules or Rules())
    return next(c for c in decision.candidates if c.node == name(number))


def test_what_a_node_has_evaluated_before_is_not_prefilled_again() -> None:
    fleet = Fleet()
    for number in (1, 2):
        node(fleet, number, resident={"m": resident()})
    fleet.nodes[name(2)].take(ask(prefix=CHAT), NOW_S - 9, 1.0).drop(20)
    asked = ask(prompt_tokens=200, prefix=(*CHAT, (b"turn 2", 200)))
    assert decide(asked, fleet, Speeds(), NOW_S).node == name(2)
    whole, part = (candidate(fleet, number, asked).terms["prefill_s"] for number in (1, 2))
    assert part == pytest.approx(whole * (200 - 150 - 20) / 200)
    foreign = ask(prompt_tokens=200, prefix=((b"another", 200),))
    assert candidate(fleet, 2, foreign).terms["prefill_s"] == pytest.approx(whole)


def test_a_cache_is_not_worth_a_long_wait() -> None:
    fleet = Fleet()
    for number in (1, 2):
        node(fleet, number, resident={"m": resident()})
    fleet.nodes[name(2)].take(ask(prefix=CHAT), NOW_S, 60.0)
    assert decide(ask(prefix=CHAT), fleet, Speeds(), NOW_S).node == name(1)


def test_company_slows_decoding_as_it_was_learned_of_the_node() -> None:
    fleet, speeds = Fleet(), Speeds()
    n = node(fleet, 1, parallel=2, resident={"m": resident()})
    alone = candidate(fleet, speeds=speeds).terms["decode_s"]
    n.take(ask(), NOW_S, 5.0)
    n.take(ask("other"), NOW_S, 5.0)
    both = candidate(fleet, speeds=speeds).terms["decode_s"]
    assert both == pytest.approx(alone * speeds.slowdown(n.name, 1, 1))


def test_what_we_take_from_those_who_decode_there_counts_as_ours() -> None:
    fleet, speeds = Fleet(), Speeds()
    n = node(fleet, 1, parallel=4, resident={"m": resident()})
    assert candidate(fleet, speeds=speeds).terms["neighbours_s"] == 0
    n.take(ask(), NOW_S, expected_s=0.5, service_s=0.5)
    terms = candidate(fleet, speeds=speeds).terms
    added = speeds.slowdown(n.name, 1) - 1
    assert terms["neighbours_s"] == pytest.approx(NEIGHBOURS * added * 0.5)  # it ends before us
    n.take(ask(), NOW_S, expected_s=500, service_s=500)
    terms = candidate(fleet, speeds=speeds).terms
    added = speeds.slowdown(n.name, 2) / speeds.slowdown(n.name, 1) - 1
    assert terms["neighbours_s"] == pytest.approx(NEIGHBOURS * added * 2 * terms["decode_s"])  # we end first


def evicting(speeds: Speeds, **fields: object) -> float:
    """The price of evicting ``a``, a file of 4 GiB that takes 9, in what loading it again counts."""
    fleet = Fleet()
    models = {key: row() for key in ("m", "a")}
    full = report(gpu_gib=20, free_gib=1)
    node(fleet, 1, report=full, models=models, resident={"a": resident(9)}, loaded_with={"a": ()}, **fields)
    found = candidate(fleet, speeds=speeds)
    assert "evicts 1" in found.notes
    return found.terms["evict_s"] / (LOADED_AGAIN * 4 * GIB / 1e9)


def test_an_evicted_model_costs_its_load_as_far_as_it_is_wanted() -> None:
    assert evicting(Speeds()) == pytest.approx(0.5)  # nobody knows
    speeds = Speeds()
    speeds.demand.note(ask("a"), NOW_S - 1200)
    rare = evicting(speeds)
    assert rare == pytest.approx(speeds.demand.again_within("a", (), KEPT_S, NOW_S)) and rare < 0.1
    for second in range(10):
        speeds.demand.note(ask("a"), NOW_S - second)
    assert evicting(speeds) > 0.9
    assert evicting(Speeds(), pinned=frozenset({"a"})) == pytest.approx(1)


def test_demand_for_other_options_does_not_protect_a_runner() -> None:
    speeds = Speeds()
    for second in range(10):
        speeds.demand.note(ask("a", num_ctx=8192), NOW_S - second)
    assert evicting(speeds) == 0


def test_a_reload_evicts_what_was_loaded_under_other_options() -> None:
    fleet, speeds = Fleet(), Speeds()
    node(fleet, 1, resident={"m": resident(context=8192)}, loaded_with={"m": (("num_ctx", 8192),)})
    for second in range(10):
        speeds.demand.note(ask(num_ctx=8192), NOW_S - second)
    found = candidate(fleet, asked=ask(num_ctx=4096), speeds=speeds)
    assert found.terms["evict_s"] == pytest.approx(LOADED_AGAIN * found.terms["load_s"], rel=0.1)
    assert candidate(fleet, asked=ask(num_ctx=8192), speeds=speeds).terms["evict_s"] == 0


@pytest.mark.parametrize("faster", [1.0, 1.8])
def test_two_contexts_settle_on_a_node_each(faster: float) -> None:
    fleet, speeds, loads = Fleet(), Speeds(), 0
    node(fleet, 1, report=report(bandwidth=500e9 * faster))
    node(fleet, 2)
    placed: dict[int, Counter[str]] = {4096: Counter(), 8192: Counter()}
    for turn in range(40):
        now_s = NOW_S + 5.0 * turn
        asked = ask(num_ctx=(4096, 8192)[turn * 7 % 3 % 2])  # in no strict order
        assert asked.num_ctx is not None
        speeds.demand.note(asked, now_s)
        decision = decide(asked, fleet, speeds, now_s)
        assert decision.node is not None and decision.chosen is not None
        n = fleet.nodes[decision.node]
        loads += decision.chosen.terms["load_s"] > 0
        n.take(asked, now_s, decision.expected_s, service_s=decision.service_s).drop()
        n.loaded_with["m"] = asked.reload_key
        n.holds({"m": resident(context=asked.num_ctx)})
        placed[asked.num_ctx][n.name] += 1
    assert loads == 2
    assert [len(nodes) for nodes in placed.values()] == [1, 1]


def test_what_a_slow_node_could_lose_by_a_long_answer_counts_a_little() -> None:
    fleet, speeds = Fleet(), Speeds()
    node(fleet, 1, report=report(bandwidth=250e9), resident={"m": resident()})
    node(fleet, 2, report=report(bandwidth=500e9), resident={"m": resident()})
    slow, fast = candidate(fleet, 1, speeds=speeds), candidate(fleet, 2, speeds=speeds)
    assert fast.terms["risk_s"] == 0
    lengths = speeds.output(ask())
    token_s = fast.terms["decode_s"] / lengths.mean  # and twice that on the slow one
    assert slow.terms["risk_s"] == pytest.approx(RISK * (lengths.quantile(0.9) - lengths.mean) * token_s)
    known = candidate(fleet, 1, ask(max_tokens=1), speeds)
    assert known.terms["risk_s"] == pytest.approx(0, abs=1e-9)


def test_who_streams_for_long_is_expected_to_go_on_for_long() -> None:
    waits = []
    for streamed_s in (0.1, 5.0, 60.0):
        fleet = Fleet()
        n = node(fleet, 1, resident={"m": resident()})
        flight = n.take(ask(), NOW_S - streamed_s, expected_s=1.0, service_s=1.0)
        flight.first_byte_s = NOW_S - streamed_s
        waits.append(candidate(fleet).terms["wait_s"])
    assert waits == sorted(waits) and waits[2] > 2 * waits[0] > 0


@pytest.mark.parametrize("policy", ["finish_time", "score"])
def test_nodes_that_are_set_to_do_a_kind_are_preferred_within_the_factor(policy: str) -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(bandwidth=300e9), resident={"m": resident()})
    node(fleet, 2, report=report(bandwidth=400e9), resident={"m": resident()})
    fleet.nodes[name(1)].turn = 1  # it is not its turn
    rules = Rules(specialise={"summarization": frozenset({name(1)})}, specialise_factor=2.0)
    asked = ask(kind="summarization")
    decision = decide(asked, fleet, Speeds(), NOW_S, policy, rules=rules)
    assert decision.node == name(1)
    other_kind = decide(ask(), fleet, Speeds(), NOW_S, policy, rules=rules)
    assert other_kind.node == name(2)
    if policy == "finish_time":
        outside = candidate(fleet, 2, asked, rules=rules)
        assert outside.terms["outside_s"] == pytest.approx(outside.cost / 2)
    # Where none of those who should can, the others are as good as ever.
    fleet.nodes[name(1)].leaving = True
    alone = decide(asked, fleet, Speeds(), NOW_S, policy, rules=rules)
    assert alone.node == name(2) and alone.row is not None and not alone.row.outside


def test_a_specialised_node_that_is_far_slower_is_passed_over() -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(gpu_gib=0), resident={"m": resident(on_gpu=0)})
    node(fleet, 2, resident={"m": resident()})
    rules = Rules(specialise={"generation": frozenset({name(1)})}, specialise_factor=2.0)
    assert decide(ask(), fleet, Speeds(), NOW_S, rules=rules).node == name(2)


@pytest.mark.parametrize("policy", POLICIES)
def test_embeddings_are_kept_off_large_gpus_while_another_node_can(policy: str) -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(gpu_gib=24, bandwidth=2000e9), resident={"m": resident()})
    node(fleet, 2, report=report(gpu_gib=8, bandwidth=100e9))
    fleet.nodes[name(2)].take(ask(), NOW_S, 60.0)  # busy is no reason
    rules = Rules(embeddings_max_vram_bytes=8 * GIB)
    embed = ask(path="/api/embed")
    decision = decide(embed, fleet, Speeds(), NOW_S, policy, rules=rules)
    assert decision.node == name(2)
    why = {c.node: c.excluded for c in decision.candidates}[name(1)]
    assert why == "has more GPU memory than embeddings are given while another node can serve them"
    fleet.nodes[name(2)].leaving = True
    assert decide(embed, fleet, Speeds(), NOW_S, policy, rules=rules).node == name(1)
    fleet.nodes[name(2)].leaving = False
    assert {c.excluded for c in decide(ask(), fleet, Speeds(), NOW_S, policy, rules=rules).candidates} == {
        None
    }


def test_a_gpu_node_that_serves_from_the_cpu_is_priced_so_at_once_whatever_was_measured() -> None:
    fleet, speeds = Fleet(), Speeds()
    gpu = node(fleet, 1, report=report(bandwidth=1000e9), resident={"m": resident()})
    node(fleet, 2, report=report(bandwidth=250e9), resident={"m": resident()})
    for n, tok_s in ((gpu, 120.0), (fleet.nodes[name(2)], 30.0)):
        for _ in range(5):
            stats = FinalStats(200, 100, 0.0, 200 / (30 * tok_s), 100 / tok_s)
            speeds.observe(n, ask(), stats, 0.1, 100 / tok_s, 1, NOW_S)
    fast = candidate(fleet, 1, speeds=speeds)
    assert decide(ask(), fleet, speeds, NOW_S).node == name(1)
    gpu.holds({"m": resident(on_gpu=0)})
    slow = candidate(fleet, 1, speeds=speeds)
    assert "CPU offload 100%" in slow.notes
    assert slow.terms["decode_s"] > 20 * fast.terms["decode_s"]
    assert decide(ask(), fleet, speeds, NOW_S).node == name(2)
    # Nor does what is measured meanwhile stick to the GPU once it is used again.
    for _ in range(5):
        stats = FinalStats(200, 100, 0.0, 200 / (30 * 4.8), 100 / 4.8)
        speeds.observe(gpu, ask(), stats, 0.1, 100 / 4.8, 1, NOW_S)
    assert candidate(fleet, 1, speeds=speeds).terms["decode_s"] == pytest.approx(
        slow.terms["decode_s"], rel=0.3
    )
    gpu.holds({"m": resident()})
    assert candidate(fleet, 1, speeds=speeds).terms["decode_s"] < 2 * fast.terms["decode_s"]
    assert decide(ask(), fleet, speeds, NOW_S).node == name(1)


@pytest.mark.parametrize("gpu_gib", [0, 8])
def test_what_runs_on_the_cpu_is_as_fast_as_the_memory_was_measured_to_be(gpu_gib: float) -> None:
    fleet = Fleet()
    for number, ram_bytes_s in ((1, None), (2, 80e9)):
        said = report(gpu_gib=gpu_gib, bandwidth=400e9)
        host = said.host.model_copy(update={"memory_bandwidth_bytes_s": ram_bytes_s})
        said = said.model_copy(update={"host": host})
        node(fleet, number, report=said, resident={"m": resident(on_gpu=0)})
    assumed, measured = (candidate(fleet, number).terms["decode_s"] for number in (1, 2))
    assert assumed == pytest.approx(2 * measured)


NUMBERS = st.floats(0, 1e3)
ROWS = st.builds(
    Features,
    node=st.sampled_from(("a:1", "b:1")),
    wait_s=NUMBERS,
    load_s=NUMBERS,
    s_per_prompt_token=st.floats(1e-5, 1),
    s_per_output_token=st.floats(1e-4, 1),
    cached_tokens=NUMBERS,
    evict_s=NUMBERS,
    success_rate=st.floats(0.01, 0.999),
    in_flight=st.integers(0, 9),
    turn=st.integers(0, 3),
    poll_latency_s=st.none() | st.floats(0, 1),
    outside=st.booleans(),
    notes=st.sampled_from(((), ("resident",), ("load", "evicts 1"))),
)
ASKS = st.builds(
    AskFeatures,
    prompt_tokens=NUMBERS,
    output_tokens=NUMBERS,
    output_tokens_high=NUMBERS,
    specialise_factor=st.floats(1, 5),
)


@given(asked=ASKS, rows=st.lists(ROWS, min_size=1, max_size=6), policy=st.sampled_from(sorted(POLICIES)))
def test_a_choice_can_be_made_again_from_what_was_written_down(
    asked: AskFeatures, rows: list[Features], policy: str
) -> None:
    text = orjson.dumps([asked.as_row(), [row.as_row() for row in rows]])
    back, kept = orjson.loads(text)
    read = AskFeatures.from_row(back), [Features.from_row(row) for row in kept]
    assert read == (asked, rows)
    costs = [POLICIES[policy].cost(asked, row) for row in rows]
    index = choose(policy, *read)
    assert costs[index] == min(costs)
    assert all(rows[index].turn <= row.turn for row, c in zip(rows, costs, strict=True) if c == min(costs))


@given(asked=ASKS, row=ROWS)
def test_every_term_of_the_finish_time_is_in_its_cost_and_none_is_negative(
    asked: AskFeatures, row: Features
) -> None:
    asked.output_tokens_high = max(asked.output_tokens_high, asked.output_tokens)
    policy = POLICIES["finish_time"]
    terms = policy.terms(asked, row)
    assert tuple(terms) == TERMS
    assert sum(terms.values()) == pytest.approx(policy.cost(asked, row))
    assert all(value >= 0 for value in terms.values())
