"""Sizes against shapes of real models, and what goes where on a node."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.fleet.learning import MAX_SIZES, Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.fleet.sessions import Session
from proxy_addon.placement.calibration import observe_sizes
from proxy_addon.placement.memory import (
    GPU_RESERVE_BYTES,
    expected_bytes,
    fit,
    kv_bytes,
    need_bytes,
    room_of,
    shape_of,
)
from proxy_addon.placement.policies import decide
from tests.proxy.placement.worlds import GIB, NOW_S, ask, name, node, report, resident

MIB = 1 << 20
LLAMA3_8B: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.context_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
GEMMA3_4B: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 34,
    "gemma3.embedding_length": 2560,
    "gemma3.context_length": 131_072,
    "gemma3.attention.head_count": 8,
    "gemma3.attention.head_count_kv": 4,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.sliding_window": 1024,
}


def test_kv_of_a_model_without_sliding_window() -> None:
    shape = shape_of(LLAMA3_8B, 5 * GIB)
    assert shape is not None and shape.context_length == 8192
    assert kv_bytes(shape, 8192) == GIB  # 128 KiB a token, as published for this model
    assert kv_bytes(shape, 8192, parallel=4) == 4 * GIB
    assert need_bytes(shape, 5 * GIB, 8192) == 7 * GIB


def test_sliding_windows_keep_most_of_gemma3_small() -> None:
    shape = shape_of(GEMMA3_4B, 3 * GIB)
    assert shape is not None
    per_layer_token = 512 * 4 * 2
    assert kv_bytes(shape, 131_072) == (5 * 131_072 + 29 * (1024 + 512)) * per_layer_token
    assert kv_bytes(shape, 1024) == 34 * 1024 * per_layer_token  # never more than the context


@pytest.mark.parametrize(
    "gone", ["llama.block_count", "llama.embedding_length", "llama.attention.head_count"]
)
def test_an_incomplete_shape_is_none(gone: str) -> None:
    assert shape_of({**LLAMA3_8B, gone: None}, GIB) is None
    assert shape_of({}, GIB) is None


def test_null_arrays_are_taken_as_grouped_queries() -> None:
    shape = shape_of({**LLAMA3_8B, "llama.attention.head_count_kv": None}, GIB)
    assert shape is not None and shape.whole_kv_heads == 32 * 8


def test_without_a_shape_the_rule_is_near_for_models_from_1b_to_70b() -> None:
    for size_gb, kv_kib in ((4.9, 128), (40, 320)):
        size = int(size_gb * 1e9)
        assert need_bytes(None, size, 10_000) - need_bytes(None, size, 0) == pytest.approx(
            kv_kib * 1024 * 10_000, rel=0.2
        )


def test_what_is_free_suffices() -> None:
    found = fit(7 * GIB, room_of(report(gpu_gib=8)), {}, "m")
    assert (found.fits, found.gpu_share, found.evicts) == (True, 1.0, ())


def test_the_rest_goes_to_ram_and_too_much_goes_nowhere() -> None:
    room = room_of(report(gpu_gib=8, ram_gib=16))
    partly = fit(16 * GIB, room, {}, "m")
    assert partly.fits
    assert partly.gpu_share == pytest.approx((8 * GIB - GPU_RESERVE_BYTES) / (16 * GIB))
    too_much = fit(24 * GIB, room, {}, "m")
    assert not too_much.fits and too_much.note == "does not fit: needs 24.0 GiB, has 23.6 GiB"


def test_unified_memory_is_not_counted_twice() -> None:
    room = room_of(report(gpu_gib=16, ram_gib=20, vendor="apple"))
    assert fit(15 * GIB, room, {}, "m").gpu_share == 1
    assert not fit(18 * GIB, room, {}, "m").fits


def test_a_machine_without_accelerator_computes_in_ram() -> None:
    room = room_of(report(gpu_gib=0, ram_gib=16))
    assert fit(15 * GIB, room, {}, "m").gpu_share == 1
    assert not fit(17 * GIB, room, {}, "m").fits


def test_an_additional_model_leaves_a_fifth_of_what_is_free() -> None:
    room = room_of(report(gpu_gib=24, free_gib=10))
    assert fit(7 * GIB, room, {"a": resident(8)}, "m").evicts == ()
    assert fit(8 * GIB, room, {"a": resident(8)}, "m").evicts == ("a",)
    assert fit(8 * GIB, room, {}, "m").evicts == ()


def test_idle_models_with_the_shortest_session_go_first_and_no_more_than_needed() -> None:
    sessions = {"long": Session(300), "short": Session(60), "busy": Session(0)}
    rows, room = dict.fromkeys(sessions, resident(6)), room_of(report(gpu_gib=24, free_gib=5))

    def evicts(need: int) -> tuple[str, ...]:
        return fit(need, room, rows, "m", {"busy"}, sessions).evicts

    assert evicts(6 * GIB) == ("short",)
    assert evicts(12 * GIB) == ("short", "long")
    assert evicts(20 * GIB) == ("short", "long", "busy")


def test_a_reload_gives_back_its_own_memory_first() -> None:
    room = room_of(report(gpu_gib=8, free_gib=1))
    assert fit(7 * GIB, room, {"m": resident(6.5)}, "m").evicts == ()


def test_observed_sizes_correct_the_estimate_for_other_nodes() -> None:
    fleet, speeds = Fleet(), Speeds()
    node(fleet, 1, resident={"m": resident(11)})
    node(fleet, 2, report=report(gpu_gib=8, ram_gib=2))
    before = {c.node: c.excluded for c in decide(ask(), fleet, speeds, NOW_S).candidates}
    for each in fleet:
        observe_sizes(each, speeds)
    after = {c.node: c.excluded for c in decide(ask(), fleet, speeds, NOW_S).candidates}
    assert before[name(2)] is None
    assert after[name(2)] == "does not fit: needs 11.0 GiB, has 9.6 GiB"


def test_head_counts_may_differ_from_layer_to_layer() -> None:
    hybrid = {**LLAMA3_8B, "llama.attention.head_count_kv": [8, 0, 0, 0] * 8}  # every fourth layer attends
    shape = shape_of(hybrid, 5 * GIB)
    assert shape is not None
    assert kv_bytes(shape, 8192) == GIB // 4


def test_windows_may_be_told_for_each_layer_or_by_how_many() -> None:
    window, layer_token = 128, 2 * 128 * 8 * 2
    for pattern in ([True, False] * 16, 2):
        info = {
            **LLAMA3_8B,
            "llama.attention.sliding_window": window,
            "llama.attention.sliding_window_pattern": pattern,
        }
        shape = shape_of(info, 5 * GIB)
        assert shape is not None
        assert kv_bytes(shape, 8192) == 16 * (8192 + window + 512) * layer_token


def test_a_models_size_is_learned_for_each_context() -> None:
    speeds, shape = Speeds(), shape_of(LLAMA3_8B, 5 * GIB)
    assert shape is not None

    def need(num_ctx: int) -> int:
        return expected_bytes(shape, 5 * GIB, num_ctx, seen=speeds.sizes("m"))

    assert need(8192) == 7 * GIB
    speeds.observe_size("m", 8192, int(6.5 * GIB))
    assert need(8192) == pytest.approx(6.5 * GIB)
    assert need(4096) == pytest.approx(6.5 * GIB * 6.5 / 7)  # nothing better is known: as wrong as there
    # What a cache that is far smaller than thought takes off a long context says nothing of the weights.
    speeds.observe_size("m", 131_072, 7 * GIB)
    assert need(131_072) == pytest.approx(7 * GIB)
    assert need(65_536) == 5 * GIB
    assert need(8192) == pytest.approx(6.5 * GIB)


def test_sizes_are_kept_over_a_restart_and_their_number_is_bounded() -> None:
    speeds = Speeds()
    for tokens in range(1, 40):
        speeds.observe_size("m", tokens, GIB)
    speeds.observe_size("m", 30, GIB)
    speeds.observe_size("m", 40, GIB)
    kept = Speeds.from_json(speeds.to_json()).sizes("m")
    assert len(kept) == MAX_SIZES
    assert 30 in kept and 24 not in kept
