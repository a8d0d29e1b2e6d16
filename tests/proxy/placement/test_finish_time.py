"""Each term of the expected finish time, alone; then what must hold for all of them."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.report import Report
from proxy_addon.ask import Ask, ReloadKey, parse
from proxy_addon.endpoints import match
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement import policies, view
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.memory import NOTHING_SEEN
from proxy_addon.placement.policies import decide
from proxy_addon.placement.runner import runs_under
from proxy_addon.placement.scene import Scene
from proxy_addon.placement.survey import LOADED_AGAIN
from proxy_addon.placement.view import look
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import NOW_S, ask, name, node, report, resident, row


def candidate(fleet: Fleet, number: int, asked: Ask | None = None, speeds: Speeds | None = None) -> Candidate:
    decision = decide(asked or ask(), fleet, speeds or Speeds(), NOW_S)
    return next(c for c in decision.candidates if c.node == name(number))


def test_the_cost_is_the_sum_of_its_terms_and_the_cheapest_wins() -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(bandwidth=300e9))
    node(fleet, 2, report=report(bandwidth=900e9))
    decision = decide(ask(), fleet, Speeds(), NOW_S)
    assert decision.node == name(2)
    for found in decision.candidates:
        assert found.cost == pytest.approx(sum(found.terms.values()))
    chosen = decision.chosen
    assert chosen is not None
    assert decision.service_s == pytest.approx(chosen.terms["prefill_s"] + chosen.terms["decode_s"])
    assert decision.expected_s == pytest.approx(decision.service_s + chosen.terms["load_s"])


def test_a_resident_model_beats_a_load_elsewhere() -> None:
    fleet = Fleet()
    node(fleet, 1, resident={"m": resident()})
    node(fleet, 2)
    assert decide(ask(), fleet, Speeds(), NOW_S).node == name(1)
    assert candidate(fleet, 1).terms["load_s"] == 0
    assert candidate(fleet, 2).terms["load_s"] > 0


@pytest.mark.parametrize(
    ("sent", "context", "num_ctx", "gpu_gib", "note"),
    [
        (None, 4096, None, 8, "resident"),  # the default of a GPU with less than 23 GiB
        (None, 4096, 4096, 8, "resident"),
        (None, 8192, 8192, 8, "resident"),
        (None, 8192, None, 8, "reload: num_ctx 8192 → 4096"),  # loaded with an explicit one
        (None, 32768, None, 24, "resident"),
        (None, 4096, 32768, 24, "reload: num_ctx 4096 → 32768"),
        (None, 40000, 99999, 8, "resident"),  # both clamped to the training context
        ((), 5000, None, 8, "resident"),  # the node has a default of its own
        ((), 4096, 8192, 8, "reload: num_ctx 4096 → 8192"),
        ((("num_ctx", 8192),), 4096, 8192, 8, "reload: num_ctx 4096 → 8192"),  # somebody else reloaded it
        ((("num_gpu", 10),), 4096, None, 8, "resident"),  # who names no layers takes what there is
        ((("num_thread", 4),), 4096, None, 8, "reload: other options"),
        (None, None, 8192, 8, "resident"),  # an Ollama that does not tell the context
    ],
)
def test_reloads(
    sent: ReloadKey | None,
    context: int | None,
    num_ctx: int | None,
    gpu_gib: float,
    note: str,
) -> None:
    fleet = Fleet()
    n = node(
        fleet,
        1,
        report=report(gpu_gib=gpu_gib),
        resident={"m": resident(context=context)},
        models={"m": row(context_length=40_000)},
    )
    if sent is not None:
        n.loaded_with["m"] = sent
    found = candidate(fleet, 1, ask(num_ctx=num_ctx))
    assert found.notes[0] == note
    assert (found.terms["load_s"] > 0) == note.startswith("reload")


LAYERS = (("num_gpu", 10),)


@pytest.mark.parametrize(
    ("sent", "asked", "note"),
    [
        (LAYERS, LAYERS, "resident"),
        (LAYERS, (("num_gpu", 0),), "reload: other options"),
        ((), LAYERS, "reload: other options"),
        (None, LAYERS, "reload: options that may differ"),
    ],
)
def test_only_who_names_another_number_of_layers_reloads_for_it(
    sent: ReloadKey | None, asked: ReloadKey, note: str
) -> None:
    fleet = Fleet()
    n = node(fleet, 1, resident={"m": resident()})
    if sent is not None:
        n.loaded_with["m"] = sent
    assert candidate(fleet, 1, ask(reload_key=asked)).notes[0] == note


def test_a_load_under_way_is_shared_by_whoever_names_no_layers() -> None:
    fleet = Fleet()
    n = node(fleet, 1)
    n.take(ask(reload_key=LAYERS), NOW_S - 3, expected_s=10, load=True, service_s=2)
    assert candidate(fleet, 1).notes == ("shares a load under way",)
    assert candidate(fleet, 1, ask(reload_key=(("num_gpu", 0),))).notes != ("shares a load under way",)


@pytest.mark.parametrize(
    ("before", "asked", "loads", "now"),
    [
        (LAYERS, (), False, LAYERS),
        (LAYERS, (("num_ctx", 8192),), False, (("num_ctx", 8192), *LAYERS)),
        (LAYERS, (), True, ()),  # a load of its own: as many as fit
        (LAYERS, (("num_gpu", 0),), True, (("num_gpu", 0),)),
        (None, (), False, ()),
    ],
)
def test_a_runner_keeps_its_layers_until_it_is_loaded_anew(
    before: ReloadKey | None, asked: ReloadKey, loads: bool, now: ReloadKey
) -> None:
    assert runs_under(before, asked, loads) == now


@pytest.mark.parametrize(
    ("named", "context", "note"),
    [
        ({}, 8192, "resident"),  # loaded by others, under what the Modelfile sets
        ({}, 4096, "reload: num_ctx 4096 → 8192"),  # somebody named the node's default
        ({"num_ctx": 4096}, 4096, "resident"),
        ({"num_ctx": 4096}, 8192, "reload: num_ctx 8192 → 4096"),
        ({"num_thread": 0}, 8192, "reload: options that may differ"),  # 0 is as without, and so another value
        ({"num_thread": 4}, 8192, "resident"),
        ({"num_thread": 8}, 8192, "reload: options that may differ"),
    ],
)
def test_what_the_modelfile_sets_holds_where_a_request_says_nothing(
    named: dict[str, int], context: int, note: str
) -> None:
    fleet = Fleet(modelfiles={"d": (("num_ctx", 8192), ("num_thread", 4))})
    node(fleet, 1, resident={"m": resident(context=context)})
    endpoint = match("/api/chat")
    assert endpoint is not None
    body = orjson.dumps({"model": "m", "options": named})
    asked = parse(endpoint, "/api/chat", {}, body, "client")
    asked.key = "m"
    asked.settle(fleet.usual("m"))
    assert candidate(fleet, 1, asked).notes[0] == note


def test_a_context_of_the_modelfile_counts_in_what_a_model_needs() -> None:
    fleet = Fleet(modelfiles={"d": (("num_ctx", 1_000_000),)})
    node(fleet, 1)
    asked = ask()
    assert candidate(fleet, 1, asked).excluded is None
    asked.settle(fleet.usual("m"))
    excluded = candidate(fleet, 1, asked).excluded
    assert excluded is not None and excluded.startswith("does not fit")


@pytest.mark.parametrize(
    ("context", "reload"), [(4096, False), (32768, False), (262144, False), (8192, True)]
)
def test_without_an_agent_any_default_context_counts_as_default(context: int, reload: bool) -> None:
    fleet = Fleet()
    node(fleet, 1, report=None, resident={"m": resident(context=context)})
    assert candidate(fleet, 1).notes[0].startswith("reload") == reload


def test_requests_beyond_the_slots_wait_for_their_remaining_time() -> None:
    fleet = Fleet()
    n = node(fleet, 1, parallel=2, resident={"m": resident()})
    n.take(ask(), NOW_S - 4, expected_s=10, service_s=10)
    assert candidate(fleet, 1).terms["wait_s"] == 0
    n.take(ask(), NOW_S - 1, expected_s=4, service_s=4)
    assert candidate(fleet, 1).terms["wait_s"] == pytest.approx(3)
    n.take(ask(), NOW_S, expected_s=8, service_s=5)  # begins after the second
    assert candidate(fleet, 1).terms["wait_s"] == pytest.approx(6)


def test_an_overdue_request_is_expected_to_take_longer_the_longer_it_took() -> None:
    waits = []
    for age_s in (8, 10, 40):
        fleet = Fleet()
        n = node(fleet, 1, resident={"m": resident()})
        n.take(ask(), NOW_S - age_s, expected_s=10, service_s=10)
        waits.append(candidate(fleet, 1).terms["wait_s"])
    assert waits == pytest.approx([2, 2.5, 10])


def test_requests_for_another_resident_model_slow_down_but_are_not_waited_for() -> None:
    fleet = Fleet()
    n = node(fleet, 1, resident={"m": resident()})
    alone = candidate(fleet, 1).terms
    n.take(ask("other"), NOW_S, expected_s=10)
    beside = candidate(fleet, 1).terms
    assert beside["wait_s"] == 0
    assert beside["decode_s"] > alone["decode_s"]


def test_a_load_under_way_is_shared() -> None:
    fleet = Fleet()
    n = node(fleet, 1)
    n.take(ask(), NOW_S - 3, expected_s=10, load=True, service_s=2)
    found = candidate(fleet, 1)
    assert found.notes == ("shares a load under way",)
    assert found.terms["load_s"] == pytest.approx(5)
    assert found.terms["wait_s"] == pytest.approx(2)


def test_a_load_with_other_options_is_not_shared() -> None:
    fleet = Fleet()
    n = node(fleet, 1)
    n.take(ask(num_ctx=8192), NOW_S - 3, expected_s=10, load=True, service_s=2)
    found = candidate(fleet, 1)
    assert "shares a load under way" not in found.notes


def test_loads_on_one_node_are_serial() -> None:
    fleet = Fleet()
    n = node(fleet, 1, report=report(gpu_gib=22), models={"m": row(), "other": row()})
    n.take(ask("other"), NOW_S, expected_s=7, load=True, service_s=2)
    found = candidate(fleet, 1)
    assert found.terms["wait_s"] == pytest.approx(5)
    assert found.terms["load_s"] > 0


def test_a_reload_waits_for_the_runner_to_be_idle() -> None:
    fleet = Fleet()
    n = node(fleet, 1, parallel=4, resident={"m": resident()})
    n.take(ask(), NOW_S, expected_s=9, service_s=9)
    assert candidate(fleet, 1).terms["wait_s"] == 0
    assert candidate(fleet, 1, ask(num_ctx=8192)).terms["wait_s"] == pytest.approx(9)


def test_what_must_be_evicted_has_a_price_and_idle_models_go_first() -> None:
    fleet = Fleet()
    n = node(
        fleet,
        1,
        report=report(gpu_gib=20, free_gib=2),
        models={key: row() for key in ("m", "a", "b")},
        resident={"a": resident(8), "b": resident(9)},
    )
    n.take(ask("a"), NOW_S, expected_s=30)
    found = candidate(fleet, 1)
    assert "evicts 1" in found.notes
    assert found.terms["wait_s"] == 0
    assert found.terms["evict_s"] == pytest.approx(
        LOADED_AGAIN * 0.5 * 4 * (1 << 30) / 1e9
    )  # its file alone is read
    assert found.cost == pytest.approx(sum(found.terms.values()))


def test_offload_to_the_cpu_slows_down() -> None:
    fleet = Fleet()
    node(fleet, 1, resident={"m": resident(on_gpu=1)})
    node(fleet, 2, resident={"m": resident(on_gpu=0.5)})
    node(fleet, 3, report=report(gpu_gib=4))
    on_gpu, half, predicted = (candidate(fleet, number) for number in (1, 2, 3))
    assert half.terms["decode_s"] > 2 * on_gpu.terms["decode_s"]
    assert half.notes == ("resident", "CPU offload 50%")
    assert predicted.notes[-1].startswith("CPU offload")


def test_failures_cost_time_and_are_forgotten() -> None:
    fleet, speeds = Fleet(), Speeds()
    for number in (1, 2):
        node(fleet, number, resident={"m": resident()})
    for _ in range(5):
        speeds.observe_failure(name(1), 0.001, NOW_S)
    assert decide(ask(), fleet, speeds, NOW_S).node == name(2)
    fresh = candidate(fleet, 1, speeds=speeds).terms["failure_s"]
    later = decide(ask(), fleet, speeds, NOW_S + 7200)
    assert next(c for c in later.candidates if c.node == name(1)).terms["failure_s"] < fresh / 5


def test_equal_nodes_take_turns() -> None:
    fleet, speeds = Fleet(), Speeds()
    for number in (1, 2, 3):
        node(fleet, number, resident={"m": resident()})
    order = []
    for _ in range(6):
        chosen = decide(ask(), fleet, speeds, NOW_S).node
        assert chosen is not None
        fleet.nodes[chosen].take(ask(), NOW_S, 1.0).drop()
        order.append(chosen)
    assert order[:3] == order[3:] and len(set(order)) == 3


def test_an_embedding_and_a_load_have_nothing_to_decode() -> None:
    fleet = Fleet()
    node(fleet, 1)
    assert candidate(fleet, 1, ask(path="/api/embed")).terms["decode_s"] == 0
    load = candidate(fleet, 1, ask(load_only=True))
    assert load.terms["prefill_s"] == load.terms["decode_s"] == 0 < load.terms["load_s"]


FLIGHT = st.tuples(st.floats(0, 20), st.floats(0.1, 20), st.floats(0.05, 1))


@given(flights=st.lists(FLIGHT, max_size=6), parallel=st.integers(1, 4), is_resident=st.booleans())
def test_more_in_flight_never_makes_a_node_cheaper(
    flights: list[tuple[float, float, float]], parallel: int, is_resident: bool
) -> None:
    fleet = Fleet()
    n = node(fleet, 1, parallel=parallel, resident={"m": resident()} if is_resident else {})
    key = "m" if is_resident else "other"
    cost = candidate(fleet, 1).cost
    for turn, (age_s, expected_s, share) in enumerate(sorted(flights, reverse=True)):  # as they came
        n.take(ask(key), NOW_S - age_s + turn * 1e-6, expected_s, service_s=expected_s * share)
        more = candidate(fleet, 1).cost
        assert more >= cost - 1e-9
        cost = more


MACHINE = st.builds(
    report,
    gpu_gib=st.sampled_from((0, 4, 8, 24)),
    bandwidth=st.sampled_from((None, 200e9, 500e9, 1000e9)),
    ram_gib=st.sampled_from((4, 64)),
)


@given(machine=MACHINE, others=st.lists(MACHINE, max_size=3))
def test_a_node_that_is_better_in_everything_is_never_beaten(machine: Report, others: list[Report]) -> None:
    fleet = Fleet()
    for number, other in enumerate([machine, *others]):
        n = node(fleet, number, report=other)
        n.take(ask(), NOW_S, 3.0, load=True, service_s=1.0)
    node(
        fleet,
        9,
        report=report(gpu_gib=48, bandwidth=2000e9),
        resident={"m": resident(on_gpu=1, context=262144)},
    )
    assert decide(ask(), fleet, Speeds(), NOW_S).node == name(9)


@given(
    policy=st.sampled_from(sorted(policies.POLICIES)),
    nodes=st.lists(
        st.tuples(MACHINE, st.booleans(), st.lists(FLIGHT, max_size=3), st.floats(5, 200), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    ),
)
def test_leaving_out_who_cannot_win_never_changes_the_choice(
    policy: str, nodes: list[tuple[Report, bool, list[tuple[float, float, float]], float, int]]
) -> None:
    fleet, speeds = Fleet(), Speeds()
    for number, (machine, is_resident, flights, tok_s, parallel) in enumerate(nodes):
        kept = {"m": resident()} if is_resident else {}
        n = node(fleet, number, report=machine, resident=kept, parallel=parallel)
        speeds.observe(n, ask(), FinalStats(200, 100, 0.0, 2 / tok_s, 100 / tok_s), 0.1, 9.0, 1, NOW_S)
        for age_s, expected_s, share in flights:
            n.take(ask(), NOW_S - age_s, expected_s, service_s=expected_s * share)
    whole = decide(ask(), fleet, speeds, NOW_S, policy)
    costs = {c.node: c.cost for c in whole.candidates}
    places = look("m", fleet, speeds, NOW_S).able.places
    assert whole.ask is not None
    scene = Scene(ask(), whole.ask, speeds, NOW_S, NOW_S, None, None, NOTHING_SEEN, ())
    bounds = policies.POLICIES[policy].bounds(scene, places)
    assert all(b <= costs[p.name] + 1e-9 for b, p in zip(bounds, places, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        for module in (policies, view):
            patch.setattr(module, "WHOLE", 0)
        assert decide(ask(), fleet, speeds, NOW_S, policy).node == whole.node
