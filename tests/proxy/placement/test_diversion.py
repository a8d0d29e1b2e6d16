"""What goes to coordinators: exactly what no ordinary node holds, or what configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agent.report import Report, Shard, ShardLoad, ShardModel, ShardPlan, ShardShare
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.calibration import observe_sizes
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import POLICIES, decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.view import WHOLE
from proxy_addon.record import FinalStats
from tests.proxy.placement.worlds import DAY, GIB, NOW_S, ask, name, node, report, resident, row

KEY = "registry.ollama.ai/library/m:latest"
BIG = 40  #: GiB, far more than any node of these tests has


def shard_report(loads: tuple[ShardLoad, ...] = (), **model: Any) -> Report:
    """That of a coordinator which can serve the model, by default at 20 tokens a second after 30 s."""
    prior = {"model": "m", "fits": True, "decode_tok_s": 20.0, "prefill_tok_s": 200.0, "load_s": 30.0} | model
    shard = Shard(models=[ShardModel.model_validate(prior)], loads=list(loads))
    return report(gpu_gib=0).model_copy(update={"kind": "shard", "shard": shard})


def fleet_of(size_gib: float = BIG, coordinators: int = 1, nodes: int = 2) -> Fleet:
    """Ordinary nodes ``name(1)``, ``name(2)`` and coordinators from ``name(91)`` on, all with the model."""
    fleet = Fleet()
    for number in range(1, nodes + 1):
        node(fleet, number, models={KEY: row(size_gib)})
    for number in range(91, 91 + coordinators):
        node(fleet, number, kind="shard", models={KEY: row(size_gib)}, report=shard_report())
    return fleet


def choose(fleet: Fleet, speeds: Speeds | None = None, **more: Any) -> Decision:
    num_ctx = more.pop("num_ctx", 4096)
    return decide(ask(KEY, num_ctx=num_ctx), fleet, speeds or Speeds(), NOW_S, **more)


def why(decision: Decision) -> dict[str, str | None]:
    return {c.node: c.excluded for c in decision.candidates}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extra", [0, WHOLE])
def test_a_model_that_no_node_holds_goes_to_the_coordinator(policy: str, extra: int) -> None:
    decision = choose(fleet_of(nodes=2 + extra), policy=policy)
    assert decision.node == name(91)
    assert decision.reason.endswith("; no other node holds the model")
    assert set(why(decision).values()) == {"does not fit: needs 42.5 GiB, has 23.6 GiB", None}
    assert "over several nodes" in (decision.chosen.notes if decision.chosen else ())


@pytest.mark.parametrize("policy", POLICIES)
def test_never_while_a_node_holds_it(policy: str) -> None:
    fleet = fleet_of(size_gib=4)
    fleet.nodes[name(91)].resident[KEY] = resident()  # not even where it is loaded there already
    decision = choose(fleet, policy=policy)
    assert decision.node in (name(1), name(2))
    assert why(decision)[name(91)] == f"takes only what no other node holds; {name(1)} does"


def _full(n: Node) -> None:
    n.full_until_s = NOW_S + 1


def _returning(n: Node) -> None:
    n.health.polled()
    n.take(ask(KEY), NOW_S, 1.0)


def _busy(n: Node) -> None:
    for _ in range(50):
        n.take(ask(KEY), NOW_S, 600.0)


@pytest.mark.parametrize("state", [_full, _returning, _busy])
def test_a_node_that_is_only_busy_holds_it_still(state: Callable[[Node], None]) -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    state(fleet.nodes[name(1)])
    decision = choose(fleet)
    assert decision.node in (name(1), None)
    assert decision.awaits == ()
    assert why(decision)[name(91)] == f"takes only what no other node holds; {name(1)} does"


def test_a_node_that_was_full_for_this_very_request_holds_it_still() -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    _full(fleet.nodes[name(1)])
    assert choose(fleet, excluded={name(1): "full: server busy"}).node is None


def _down(n: Node) -> None:
    n.poll_error = "it refused the connection"


def _ejected(n: Node) -> None:
    n.health.failed(NOW_S, "reset", fatal=True)


def _leaving(n: Node) -> None:
    n.leaving = True


def _out_of_memory(n: Node) -> None:
    n.unfit_until_s[KEY] = NOW_S + 1


def _without(n: Node) -> None:
    n.models.clear()


def _other_version(n: Node) -> None:
    n.models[KEY] = row(4, digest="old").model_copy(update={"modified_at": DAY.replace(year=2025)})


@pytest.mark.parametrize("state", [_down, _ejected, _leaving, _out_of_memory, _without, _other_version])
def test_a_node_that_cannot_serve_does_not_hold_it(state: Callable[[Node], None]) -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    state(fleet.nodes[name(1)])
    decision = choose(fleet)
    assert decision.node == name(91)
    assert why(decision)[name(1)] is not None


def test_nor_does_one_that_this_request_failed_on() -> None:
    decision = choose(fleet_of(size_gib=4, nodes=1), excluded={name(1): "died: reset"})
    assert decision.node == name(91)
    assert why(decision)[name(1)] == "died: reset"


def test_what_may_be_unloaded_counts_as_room_and_what_is_resident_is_held() -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    held = fleet.nodes[name(1)]
    held.report = report(gpu_gib=8, free_gib=0.5, ram_gib=0)
    assert choose(fleet).node == name(91)
    held.resident = {"other": resident(7)}
    assert choose(fleet).node == name(1)
    held.resident = {KEY: resident(7)}
    assert choose(fleet).node == name(1)


def test_the_asked_context_decides() -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    fleet.nodes[name(91)].report = shard_report(largest_num_ctx=300_000)
    assert choose(fleet, num_ctx=4096).node == name(1)
    assert choose(fleet, num_ctx=262_144).node == name(91)
    assert choose(fleet, num_ctx=400_000).node is None
    assert why(choose(fleet, num_ctx=400_000))[name(91)] == "holds it up to num_ctx 300000, not 400000"


def test_a_coordinator_that_cannot_hold_it_either_says_why() -> None:
    fleet = fleet_of()
    fleet.nodes[name(91)].report = shard_report(fits=False, why="12.0 GiB too big for all machines together")
    decision = choose(fleet)
    assert decision.node is None
    assert decision.awaits == ()
    assert why(decision)[name(91)] == ("does not fit its nodes: 12.0 GiB too big for all machines together")


def test_a_model_that_only_coordinators_list() -> None:
    fleet = fleet_of(nodes=0)
    node(fleet, 1, models={})
    assert choose(fleet).node == name(91)


def test_configured_models_are_always_diverted() -> None:
    rules = Rules(models=frozenset({KEY}))
    decision = choose(fleet_of(size_gib=4), rules=rules)
    assert decision.node == name(91)
    assert why(decision)[name(1)] == "the model is set to be sharded"
    alone = choose(fleet_of(size_gib=4, coordinators=0), rules=rules)
    assert alone.node is None
    assert set(why(alone).values()) == {"the model is set to be sharded"}


def test_too_small_a_share_on_gpus_is_no_holding_it_unless_nobody_else_can() -> None:
    fleet, rules = fleet_of(size_gib=12, nodes=1), Rules(min_gpu_share=0.8)
    assert choose(fleet).node == name(1)
    decision = choose(fleet, rules=rules)
    assert decision.node == name(91)
    assert why(decision)[name(1)] == "would have only 55% of it on its GPUs, not 80%"
    fleet.nodes[name(91)].report = shard_report(fits=False, why="too big")
    assert choose(fleet, rules=rules).node == name(1)
    fleet.nodes[name(91)].report = shard_report()
    fleet.nodes[name(1)].report = report(gpu_gib=0, ram_gib=64)
    assert why(choose(fleet, rules=rules))[name(1)] == "would have only 0% of it on its GPUs, not 80%"


def test_a_coordinator_that_is_down_is_awaited() -> None:
    fleet = fleet_of()
    _down(fleet.nodes[name(91)])
    decision = choose(fleet)
    assert (decision.node, decision.awaits) == (None, (name(91),))
    assert choose(fleet_of(), excluded={name(91): "died: reset"}).awaits == (name(91),)


def test_kind_shard_counts_until_the_first_report_and_the_report_from_then_on() -> None:
    fleet = fleet_of(size_gib=4, nodes=1)
    single = fleet.nodes[name(91)]
    single.report = None
    assert choose(fleet).node == name(1)
    assert why(choose(fleet))[name(91)] == f"takes only what no other node holds; {name(1)} does"
    single.report = report().model_copy(update={"kind": "shard"})  # one machine behind llama-server
    assert why(choose(fleet)) == {name(1): None, name(91): None}


def test_of_two_coordinators_the_one_that_is_expected_to_finish_first() -> None:
    fleet = fleet_of(coordinators=2)
    fleet.nodes[name(91)].report = shard_report(decode_tok_s=5.0)
    assert choose(fleet).node == name(92)
    fleet.nodes[name(92)].report = shard_report(load_s=300.0)
    assert choose(fleet).node == name(91)


def test_what_a_coordinator_expects_is_believed_until_it_was_measured() -> None:
    fleet, speeds = fleet_of(nodes=0), Speeds()
    coordinator = fleet.nodes[name(91)]
    terms = choose(fleet, speeds).chosen
    assert terms is not None
    assert (terms.terms["load_s"], terms.terms["prefill_s"]) == (30.0, 1.0)
    assert terms.terms["decode_s"] == pytest.approx(speeds.output_tokens(ask(KEY)) / 20)
    coordinator.report = shard_report(decode_tok_s=10.0)  # another plan, once a node is lost
    slower = choose(fleet, speeds).chosen
    assert slower is not None
    assert slower.terms["decode_s"] == pytest.approx(speeds.output_tokens(ask(KEY)) / 10)
    with_gpu = coordinator.report.model_copy(update={"gpus": report().gpus})
    coordinator.report = with_gpu
    coordinator.resident[KEY] = resident(BIG, on_gpu=0.5)
    speeds.observe(coordinator, ask(KEY), FinalStats(200, 256, 0.0, 0.5, 8.0), 0.5, 8.5, 1, NOW_S)
    measured = choose(fleet, speeds).chosen
    assert measured is not None
    assert measured.terms["decode_s"] == pytest.approx(speeds.output_tokens(ask(KEY)) / 32)
    assert measured.terms["prefill_s"] == pytest.approx(0.5)
    assert measured.notes == ("resident",)  # a plan over CPUs as well is no offload


def test_what_was_measured_of_a_plan_says_nothing_of_the_coordinators_own_hardware() -> None:
    fleet, speeds = fleet_of(nodes=0), Speeds()
    stats = FinalStats(200, 256, 0.0, 0.5, 8.0)
    speeds.observe(fleet.nodes[name(91)], ask(KEY), stats, 0.5, 8.5, 1, NOW_S)
    assert (speeds.nodes[name(91)].decode.n, speeds.nodes[name(91)].prefill.n) == (0, 0)


def test_without_a_context_the_coordinators_default_is_its_own() -> None:
    fleet = fleet_of(nodes=0)
    fleet.nodes[name(91)].report = shard_report().model_copy(update={"gpus": report(gpu_gib=80).gpus})
    fleet.nodes[name(91)].resident[KEY] = resident(BIG, context=4096)
    decision = choose(fleet, num_ctx=None)
    assert decision.chosen is not None and decision.chosen.notes == ("resident",)


def test_what_a_node_was_seen_to_need_sends_the_next_request_to_the_coordinator() -> None:
    fleet, speeds = fleet_of(size_gib=16, nodes=1), Speeds()
    held = fleet.nodes[name(1)]
    assert choose(fleet, speeds).node == name(1)  # by the estimate it fits
    held.resident[KEY] = resident(26, on_gpu=0.3)
    observe_sizes(held, speeds)
    held.resident.clear()
    decision = choose(fleet, speeds)
    assert decision.node == name(91)
    assert why(decision)[name(1)] == "does not fit: needs 26.0 GiB, has 23.6 GiB"


def test_what_a_sharded_model_was_measured_to_need_brings_it_home() -> None:
    fleet, speeds = fleet_of(size_gib=10, nodes=1), Speeds()
    coordinator = fleet.nodes[name(91)]
    ctx = 131_072
    assert choose(fleet, speeds, num_ctx=ctx).node == name(91)  # no shape is known, the estimate is too high
    shares = [_share("a", 6), _share("b", 6)]
    coordinator.report = shard_report((_ready(ctx, [*shares, _share("c", None)]),))
    observe_sizes(coordinator, speeds)
    assert choose(fleet, speeds, num_ctx=ctx).node == name(91)  # one device has not told
    coordinator.report = shard_report((_ready(ctx, shares),))
    observe_sizes(coordinator, speeds)
    assert choose(fleet, speeds, num_ctx=ctx).node == name(1)


def _share(host: str, used_gib: float | None) -> ShardShare:
    return ShardShare(
        node=host,
        device="CUDA0",
        first_layer=0,
        layers=1,
        output=False,
        memory_bytes=GIB,
        used_bytes=int(used_gib * GIB) if used_gib is not None else None,
        ms_per_token=1.0,
    )


def _ready(num_ctx: int, shares: list[ShardShare]) -> ShardLoad:
    plan = ShardPlan(
        id="p",
        model="m",
        made_at=DAY,
        reason="a request",
        num_ctx=num_ctx,
        parallel=1,
        shares=shares,
        ms_per_token=1.0,
        load_s=1.0,
    )
    return ShardLoad(model="m", phase="ready", progress=1, since_s=0, plan=plan)


def test_a_coordinator_that_is_the_only_node_is_waited_for_while_it_is_down() -> None:
    fleet = fleet_of(nodes=0)
    fleet.nodes[name(91)].poll_error = "it refused the connection"  # then no version of the model is served
    decision = choose(fleet)
    assert (decision.node, decision.awaits) == (None, (name(91),))
    assert why(decision) == {name(91): "is down: it refused the connection"}
