"""What a machine promises before it has served anything: speeds from memory bandwidth.

Decoding one sequence reads every weight once per token, so its speed is bandwidth ÷ weight bytes times the
share of the bandwidth that engines reach (C. Chen, "Transformer Inference Arithmetic", 2022; Databricks, "LLM
Inference Performance Engineering", 2023, calls the share MBU and measures 50 to 60 % at batch size 1).
Prefill is bound by arithmetic instead; per kind of machine it is a rough multiple of the decode speed. All of
it only has to rank machines until learning.py has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.report import Report

GB = 1e9
BANDWIDTH_SHARE = 0.55
RAM_BANDWIDTH_BYTES_S = 40 * GB  #: where it was not measured: dual-channel DDR4-3200 has 51.2 GB/s at most
UNKNOWN_BANDWIDTH_BYTES_S = 200 * GB  #: no agent: between a CPU (40) and a desktop GPU (250 to 1,000)
LOAD_BYTES_S = 1 * GB  #: between a SATA SSD (0.5 GB/s) and NVMe or the page cache (2 to 10 GB/s)

#: vendor → (bandwidth where the driver does not tell it, prefill tokens per decoded token)
_VENDORS = {
    "nvidia": (400 * GB, 30.0),
    "amd": (400 * GB, 20.0),
    "apple": (200 * GB, 10.0),
}
_CPU_PREFILL_PER_DECODE = 4.0
_UNKNOWN_PREFILL_PER_DECODE = 15.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """What matters of a machine. ``known`` is False without an agent: then all of it is a neutral guess."""

    known: bool
    bandwidth_bytes_s: float
    prefill_per_decode: float
    cpu_slowdown: float  #: how many times longer a layer takes in RAM than on the accelerator

    def decode_tok_s(self, weight_bytes: int) -> float:
        """Tokens a second of one sequence, the model wholly on the accelerator (or in RAM, without one)."""
        return BANDWIDTH_SHARE * self.bandwidth_bytes_s / max(weight_bytes, 1 << 20)

    def prefill_tok_s(self, weight_bytes: int) -> float:
        """Prompt tokens a second."""
        return self.decode_tok_s(weight_bytes) * self.prefill_per_decode


#: Without an agent nobody can say beforehand what of a model will not fit its GPU: no slowdown is predicted.
UNKNOWN = Hardware(False, UNKNOWN_BANDWIDTH_BYTES_S, _UNKNOWN_PREFILL_PER_DECODE, 1.0)


def of(report: Report | None) -> Hardware:
    """The hardware that ``report`` describes; of several GPUs the fastest, for Ollama fills one first."""
    if report is None:
        return UNKNOWN
    ram_bytes_s = report.host.memory_bandwidth_bytes_s or RAM_BANDWIDTH_BYTES_S
    best = cpu = Hardware(True, ram_bytes_s, _CPU_PREFILL_PER_DECODE, 1.0)
    for gpu in report.gpus:
        guess_bytes_s, prefill_per_decode = _VENDORS[gpu.vendor]
        bandwidth_bytes_s = gpu.memory_bandwidth_bytes_s or guess_bytes_s
        if bandwidth_bytes_s > best.bandwidth_bytes_s or best is cpu:
            # Unified memory is equally fast for the CPU, which only computes more slowly.
            slowdown = 3.0 if gpu.vendor == "apple" else max(bandwidth_bytes_s / ram_bytes_s, 1.0)
            best = Hardware(True, bandwidth_bytes_s, prefill_per_decode, slowdown)
    return best


def offload_slowdown(gpu_share: float, cpu_slowdown: float) -> float:
    """How many times longer a token takes with only ``gpu_share`` of the model on the accelerator.

    Layers run one after the other, so their times add up.
    """
    return gpu_share + (1 - gpu_share) * cpu_slowdown
