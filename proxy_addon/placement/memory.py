"""Does a model at a context fit a node, and what must go for it: predictions from shapes and free memory.

The estimate is weights + KV cache + overhead. Ollama's own prediction (v0.30+, ``llm/llama_server.go``)
ignores sliding windows and explicit head sizes and never looks at system RAM, so this one is llama.cpp's own
account (``llama-kv-cache.cpp``): per attention layer context × (key + value length) × KV heads × element.
What resident models were seen to take (calibration.py) counts before any formula: :func:`expected_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from agent.report import Report, Resident
from proxy_addon.fleet.sessions import NONE, Session, as_evicted

MIB, GIB = 1 << 20, 1 << 30
KV_ELEMENT_BYTES = 2.0  #: f16, Ollama's default; q8_0 is 1.0625, q4_0 0.5625
BATCH_TOKENS = 512  #: Ollama's default num_batch, kept in addition to a sliding window
GPU_RESERVE_BYTES = 457 * MIB  #: CUDA context and library overhead that Ollama sets aside per GPU
ADDITIONAL_SHARE = 0.8  #: an additional model must be predicted to take no more of what is free (sched.go)
#: Where the shape is not known: llama 3's 128 KiB per token at 4.9 GB (8B, Q4_K_M), growing with the root of
#: the size (70B: 40 GB, 320 KiB by its shape, 366 KiB by this rule; 1B: 32 KiB against 66).
KV_TOKEN_BYTES, KV_MODEL_BYTES = 128 << 10, 4.9e9
#: Architecture → every how-manieth layer attends to the whole context; the others hold a sliding window.
GLOBAL_EVERY = {"gemma3": 6, "gptoss": 2, "gpt-oss": 2}
#: Default num_ctx by the total GPU memory of a node (``server/routes.go``).
DEFAULT_NUM_CTX = ((47 * GIB, 262_144), (23 * GIB, 32_768), (0, 4096))
SHARD_NUM_CTX = 4096  #: that of `sollol shard serve`, whatever its GPUs have (``shard/options.py``)
MOST_WRONG = 4.0  #: an estimate that is further from what was seen than this factor was of something else
NOTHING_SEEN: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides how much memory it takes. Read by :func:`shape_of`."""

    weights_bytes: int
    whole_kv_heads: int  #: of all layers that attend to the whole context, together
    windowed_kv_heads: int  #: of all layers that hold a sliding window only
    key_length: int
    value_length: int
    context_length: int | None = None  #: what it was trained for; Ollama clamps num_ctx to it
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a node, from its report. Read by :func:`room_of`."""

    gpus: bool
    unified: bool  #: accelerators use the machine's RAM: what they have free is not free twice
    gpu_free_bytes: int
    ram_free_bytes: int
    default_num_ctx: int  #: the context of a request that names none


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model would lie on a node."""

    fits: bool
    gpu_share: float = 1.0  #: of the model on accelerators; 1 on a machine that has none
    evicts: tuple[str, ...] = ()  #: canonical names of the residents that must go first
    note: str = ""  #: why not, or what is special
    need_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """A load that has begun, or will, and that no report shows yet."""

    key: str
    need_bytes: int
    evicts: tuple[str, ...] = ()


def shape_of(model_info: Mapping[str, Any], weights_bytes: int) -> ModelShape | None:
    """The shape in ``model_info`` of ``/api/show``; None where that does not have what the formula needs.

    Head counts and the pattern of sliding windows may be one number or one for each layer; what
    ``/api/show`` gives as null or leaves out follows from others: grouped-query attention with one KV head in
    four is assumed there, the mildest in wide use.
    """
    architecture = str(model_info.get("general.architecture", ""))

    def number(name: str) -> int | None:
        value = model_info.get(f"{architecture}.{name}")
        return int(value) if isinstance(value, int | float) and value > 0 else None

    def layers(name: str) -> list[int] | int | None:
        value = model_info.get(f"{architecture}.{name}")
        return [int(each) for each in value] if isinstance(value, list) and value else number(name)

    blocks, heads, width = number("block_count"), layers("attention.head_count"), number("embedding_length")
    most_heads = max(heads) if isinstance(heads, list) else heads
    length = number("attention.key_length") or (width // most_heads if width and most_heads else None)
    heads_kv = layers("attention.head_count_kv") or (max(most_heads // 4, 1) if most_heads else None)
    if blocks is None or length is None or heads_kv is None:
        return None
    window = number("attention.sliding_window")
    every = layers("attention.sliding_window_pattern") or GLOBAL_EVERY.get(architecture, 1)
    whole, windowed = _kv_heads(blocks, heads_kv, every if window else 1)
    return ModelShape(
        weights_bytes,
        whole,
        windowed,
        length,
        number("attention.value_length") or length,
        number("context_length"),
        window,
    )


def _kv_heads(blocks: int, heads: list[int] | int, every: list[int] | int) -> tuple[int, int]:
    """The KV heads of all layers with the whole context, and of those with a window.

    ``every`` is either a flag for each layer that has a window, or the how-manieth layer has none.
    """
    if isinstance(heads, int) and isinstance(every, int):
        whole = blocks // every
        return whole * heads, (blocks - whole) * heads
    each = heads if isinstance(heads, list) else [heads] * blocks
    flags = every if isinstance(every, list) else [layer % every < every - 1 for layer in range(blocks)]
    windowed = sum(count for count, flag in zip(each, flags, strict=False) if flag)
    return sum(each) - windowed, windowed


def kv_bytes(shape: ModelShape, num_ctx: int, parallel: int = 1) -> int:
    """Bytes of the KV cache for ``parallel`` sequences of ``num_ctx`` tokens."""
    cells = shape.whole_kv_heads * num_ctx * parallel
    if shape.windowed_kv_heads and shape.sliding_window:
        held = min(num_ctx * parallel, shape.sliding_window * parallel + BATCH_TOKENS)
        cells += shape.windowed_kv_heads * held
    return int(cells * (shape.key_length + shape.value_length) * KV_ELEMENT_BYTES)


def need_bytes(shape: ModelShape | None, weights_bytes: int, num_ctx: int, parallel: int = 1) -> int:
    """Memory that a model takes when loaded: weights, KV cache, and compute buffers of up to 1 GiB."""
    if shape is not None:
        cache = kv_bytes(shape, num_ctx, parallel)
    else:
        cache = int(KV_TOKEN_BYTES * (weights_bytes / KV_MODEL_BYTES) ** 0.5 * num_ctx * parallel)
    return weights_bytes + cache + min(GIB, 256 * MIB + weights_bytes // 4)


def expected_bytes(
    shape: ModelShape | None,
    weights_bytes: int,
    num_ctx: int,
    parallel: int = 1,
    seen: Mapping[int, float] = NOTHING_SEEN,
) -> int:
    """Memory that a model takes when loaded, by what it was ``seen`` to take: tokens held at most → bytes.

    Seen with as many tokens, that is what it takes. Else the estimate is corrected by how far it was off
    where it was seen most alike; but errors in the cache grow with the context, so that what was seen with
    another one never takes the estimate below the weights.
    """
    estimate = need_bytes(shape, weights_bytes, num_ctx, parallel)
    if not seen:
        return estimate
    tokens = num_ctx * parallel
    bytes_ = seen.get(tokens)
    if bytes_ is None:
        alike = min(seen, key=lambda other: abs(math.log(other / tokens)))
        bytes_ = estimate * seen[alike] / need_bytes(shape, weights_bytes, alike)
        bytes_ = max(bytes_, min(estimate, weights_bytes))
    return int(min(max(bytes_, estimate / MOST_WRONG), estimate * MOST_WRONG))


def room_of(report: Report) -> Room:
    """The memory that ``report`` tells of."""
    unified = any(gpu.vendor == "apple" for gpu in report.gpus)
    total = sum(gpu.memory_total_bytes for gpu in report.gpus)
    return Room(
        bool(report.gpus),
        unified,
        sum(max(gpu.memory_free_bytes - GPU_RESERVE_BYTES, 0) for gpu in report.gpus),
        0 if unified else report.host.ram_available_bytes,
        SHARD_NUM_CTX
        if report.kind == "shard"
        else next(ctx for at_least, ctx in DEFAULT_NUM_CTX if total >= at_least),
    )


def once_loaded(
    room: Room, resident: Mapping[str, Resident], loads: Iterable[Load]
) -> tuple[Room, Mapping[str, Resident]]:
    """The memory of a node and what is resident there once all of ``loads`` have happened."""
    gpu_free, ram_free, after = room.gpu_free_bytes, room.ram_free_bytes, dict(resident)
    for load in loads:
        for name in load.evicts:
            if name in after:
                gpu_free, ram_free = _given_back(after.pop(name), room, gpu_free, ram_free)
        if load.key not in after:
            on_gpu = min(load.need_bytes, max(gpu_free, 0)) if room.gpus else 0
            after[load.key] = Resident(name=load.key, size=load.need_bytes, size_vram=on_gpu)
            gpu_free, ram_free = gpu_free - on_gpu, ram_free - (load.need_bytes - on_gpu)
    return replace(room, gpu_free_bytes=gpu_free, ram_free_bytes=ram_free), after


def fit(
    need: int,
    room: Room,
    resident: Mapping[str, Resident],
    key: str,
    busy: Collection[str] = (),
    sessions: Mapping[str, Session] = NONE,
) -> Fit:
    """How a model of ``need`` bytes, canonical name ``key``, would lie on a node with ``room``.

    A resident of the same name is replaced. Others go, idle ones (not in ``busy``) first and in the order of
    their ``sessions`` (sessions.py), while the model does not fit wholly on the GPUs. What is still too much
    is computed from RAM; only where that does not suffice either, the model does not fit.
    """
    gpu_free, ram_free, own = room.gpu_free_bytes, room.ram_free_bytes, resident.get(key)
    if own is not None:
        gpu_free, ram_free = _given_back(own, room, gpu_free, ram_free)
    left = len(resident) - (own is not None)
    evicts: list[str] = []
    if left and need > (gpu_free if room.gpus else ram_free) * ADDITIONAL_SHARE:
        for name in _eviction_order(resident, key, busy, sessions):
            gpu_free, ram_free = _given_back(resident[name], room, gpu_free, ram_free)
            evicts.append(name)
            left -= 1
            if need <= (gpu_free if room.gpus else ram_free) * (ADDITIONAL_SHARE if left else 1.0):
                break
    if need > gpu_free + ram_free:
        return Fit(
            False,
            0.0,
            tuple(evicts),
            f"does not fit: needs {_gib(need)}, has {_gib(gpu_free + ram_free)}",
            need,
        )
    share = min(gpu_free / need, 1.0) if room.gpus and need else 1.0
    return Fit(True, share, tuple(evicts), f"CPU offload {1 - share:.0%}" if share < 1 else "", need)


def _given_back(row: Resident, room: Room, gpu_free: int, ram_free: int) -> tuple[int, int]:
    """What is free on GPUs and in RAM once ``row`` is unloaded."""
    on_gpu = row.size_vram if room.gpus else 0
    return gpu_free + on_gpu, ram_free + (0 if room.unified else row.size - on_gpu)


def _eviction_order(
    resident: Mapping[str, Resident], key: str, busy: Collection[str], sessions: Mapping[str, Session]
) -> list[str]:
    """The residents but ``key``: idle ones before busy ones."""
    others = resident.keys() - {key}
    at_work = others.intersection(busy)
    return as_evicted(others - at_work, sessions) + as_evicted(at_work, sessions)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
