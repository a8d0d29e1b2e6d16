"""The machines and models of the simulated fleets: what they have and how fast they really are.

Memory and bandwidth are the vendors' data sheets. Prompt speeds are llama-bench's ``pp 1024`` of an 8B model
at Q4_K_M as X. Dai measured it ("GPU-Benchmarks-on-LLM-Inference", May 2024), where nothing else is said.
The decode speed follows from the bandwidth: :data:`BANDWIDTH_SHARE` of it, which those measurements confirm
(127.7 tokens/s on an RTX 4090, by the rule 112; 111.7 and 104 on a 3090; 70.9 and 50 on a 3070).

A balancer that assumes the same rule would know every speed. So each machine deviates from all of this by its
own factor of up to ±30 %: cooling, power limits, drivers, the slot that the card is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fakes.ollama_node import NodeSpec
from tests.fakes.store import GIB, FakeModel, embedding_model

GB = 1e9
#: Databricks, "LLM Inference Performance Engineering", 2023, measured 50 to 60 % at batch size 1.
BANDWIDTH_SHARE = 0.55
REFERENCE_BYTES = 4.58 * GIB  #: the 8B model at Q4_K_M that prompt speeds were measured with
DEVIATION = 1.3
#: A sequence more in the batch: ``llama-batched-bench`` with an 8B model gains about 2.3× from four.
NEIGHBOUR_SLOWDOWN = 0.25
#: Processes on one GPU are time-sliced (NVIDIA, "Multi-Process Service", about what happens without it).
RUNNER_SLOWDOWN = 1.0
RAM_BYTES_S = 51.2 * GB  #: dual-channel DDR4-3200, which layers that do not fit the GPU are read from

#: Sequential reads by data sheet: Samsung 980 PRO, 970 EVO Plus, 870 EVO. Loaders reach less: see LOAD_SHARE.
NVME4, NVME3, SATA = 7.0 * GB, 3.5 * GB, 0.56 * GB
LOAD_SHARE = 0.6  #: of the drive's speed; our assumption, mapping pages and copying to the GPU included


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of machine."""

    name: str
    vram_bytes: int
    ram_bytes: int
    bandwidth_bytes_s: float
    prompt_tok_s: float  #: of the reference model
    disk_bytes_s: float
    parallel: int = 1  #: OLLAMA_NUM_PARALLEL, as an owner of such a machine might set it


RTX_4090 = Kind("RTX 4090", 24 * GIB, 64 * GIB, 1008 * GB, 6899, NVME4, 4)
RTX_3090 = Kind("RTX 3090", 24 * GIB, 64 * GIB, 936 * GB, 3865, NVME3, 2)
RTX_4080 = Kind("RTX 4080", 16 * GIB, 32 * GIB, 717 * GB, 5065, NVME4, 2)
#: Not in the measurements: the 4070 Ti's 3,653 by the ratio of their FP32 rates (22.1 and 40.1 TFLOPS).
RTX_4060_TI = Kind("RTX 4060 Ti", 16 * GIB, 32 * GIB, 288 * GB, 2013, NVME3)
RTX_3070 = Kind("RTX 3070", 8 * GIB, 16 * GIB, 448 * GB, 2284, SATA)
#: 8B at Q5_0, llama.cpp pull request 7716.
TESLA_P40 = Kind("Tesla P40", 24 * GIB, 64 * GIB, 346 * GB, 785, SATA)
#: Mixtral 8x22B (39B active parameters) at 19.7 tokens/s on a Ryzen 5950X, llamafile issue 569: 96 for 8B.
RYZEN = Kind("Ryzen 5950X", 0, 64 * GIB, RAM_BYTES_S, 96, SATA)

UNLIKE = (RTX_4090, RTX_3090, RTX_4080, RTX_4060_TI, RTX_3070, RYZEN)  #: 2×24 GB, 2×16 GB, 8 GB, CPU


def _model(
    name: str, size_gb: float, blocks: int, width: int, heads: int, kv_heads: int, ctx: int
) -> FakeModel:
    return FakeModel(
        name,
        size=int(size_gb * GB),
        block_count=blocks,
        embedding_length=width,
        head_count=heads,
        head_count_kv=kv_heads,
        context_length=ctx,
    )


#: Sizes as in Ollama's library, shapes from the models' configurations.
#: (gemma2's heads are longer than its width says; its width here is what gives them their true 256.)
GEMMA_2B = _model("gemma2:2b", 1.6, 26, 2048, 8, 4, 8192)
LLAMA_8B = _model("llama3:8b", 4.7, 32, 4096, 32, 8, 8192)
CODE_7B = _model("codegemma:7b", 5.0, 28, 4096, 16, 16, 8192)
SOLAR_11B = _model("solar:10.7b", 6.1, 48, 4096, 32, 8, 4096)
LLAMA_13B = _model("llama2:13b", 7.4, 40, 5120, 40, 40, 4096)
EMBEDDER = embedding_model("nomic-embed-text")

MODELS = (GEMMA_2B, LLAMA_8B, CODE_7B, SOLAR_11B, LLAMA_13B, EMBEDDER)


def _deviation(random: Random) -> float:
    return math.exp(random.uniform(-math.log(DEVIATION), math.log(DEVIATION)))


def machine(kind: Kind, random: Random, time_scale: float = 1.0) -> dict[str, Any]:
    """Return one machine of a kind, as the keywords of :class:`~tests.fakes.ollama_node.FakeOllama`.

    What its agent says of the bandwidth is scaled with the time, for that is what will be measured of it.
    """
    spec = NodeSpec(
        vram_bytes=kind.vram_bytes,
        ram_bytes=kind.ram_bytes,
        gpus=1 if kind.vram_bytes else 0,
        num_parallel=kind.parallel,
        time_scale=time_scale,
        load_bytes_s=LOAD_SHARE * kind.disk_bytes_s * _deviation(random),
        cpu_slowdown=max(kind.bandwidth_bytes_s / RAM_BYTES_S, 1.0),
        neighbour_slowdown=NEIGHBOUR_SLOWDOWN * _deviation(random),
        runner_slowdown=RUNNER_SLOWDOWN,
        memory_bandwidth_bytes_s=kind.bandwidth_bytes_s / time_scale,
        prefill_bytes_s=kind.prompt_tok_s * REFERENCE_BYTES * _deviation(random),
        decode_bytes_s=BANDWIDTH_SHARE * kind.bandwidth_bytes_s * _deviation(random),
    )
    return vars(spec)


def machines(kinds: Sequence[Kind], seed: int, time_scale: float = 1.0) -> list[dict[str, Any]]:
    """Return a machine of each of ``kinds``; equal seeds give equal machines."""
    return [machine(kind, Random(f"{seed} {index}"), time_scale) for index, kind in enumerate(kinds)]
