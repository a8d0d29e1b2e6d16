"""What each node can lend to a model that spans several, read from the agents' reports. Pure.

A device lends what its agent measured free, plus what a model that is about to be replaced gives back, less a
margin. Models that Ollama holds are not free already; the margin is for what those, and whoever else uses the
machine, still take. An Ollama model takes all of its memory when it is loaded (its KV cache included), so it
does not grow; one that is loaded later finds the sharded model there and plans around it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from agent.report import Report, RpcDevice
from shard.plan import Device, Host

GIB = 1 << 30
#: llama.cpp's own default keeps 1 GiB free (``--fit-target``); a tenth of a small device is as safe.
MARGIN_BYTES, MARGIN_SHARE = 1 * GIB, 0.10
#: Ollama sets this aside per GPU for the CUDA context and libraries (``llm/server.go``); an rpc-server makes
#: its own context too.
GPU_CONTEXT_BYTES = 457 << 20
#: A report older than this says nothing about what is free: agents sample every second.
STALE_S = 10.0
#: Where nobody could tell the bandwidth. CPUs: dual-channel DDR4-3200 has 51.2 GB/s at most. GPUs: a desktop
#: card of the middle class (RTX 3060: 360, RX 6700 XT: 384). Unified: an M2 Pro's.
CPU_BANDWIDTH_BYTES_S = 40e9
GPU_BANDWIDTH_BYTES_S: Mapping[str, float] = {"nvidia": 400e9, "amd": 400e9, "apple": 200e9}


class Lenders(NamedTuple):
    """The nodes that can take part, and why the others cannot."""

    hosts: list[Host]
    left_out: dict[str, str]


def hosts(
    reports: Mapping[str, Report],
    local: str,
    has_model: Collection[str],
    *,
    given_back: Mapping[tuple[str, str], int] | None = None,
    build: str | None = None,
) -> Lenders:
    """Return the hosts among ``reports`` (name → report); ``local`` is the coordinator's own.

    ``build`` is the coordinator's llama.cpp; None to take its own report's. ``given_back`` maps
    (host, device) to what is held there for a model that this plan replaces.
    """
    own = reports.get(local)
    if build is None and own is not None and own.rpc is not None:
        build = own.rpc.build
    found, left_out = [], {}
    for name, report in sorted(reports.items()):
        why = None if name == local else _why_not(report, build)
        if why is None:
            freed = {device: size for (host, device), size in (given_back or {}).items() if host == name}
            devices = _devices(name, report, freed)
            if devices or name == local:
                found.append(Host(name, tuple(devices), name in has_model))
                continue
            why = "it has no memory to lend"
        left_out[name] = why
    return Lenders(found, left_out)


def _why_not(report: Report, build: str | None) -> str | None:
    """Why a node that is not the coordinator's own cannot take part."""
    rpc = report.rpc
    if rpc is None:
        return "its agent is too old to lend its memory"
    if rpc.error is not None:
        return rpc.error
    if rpc.tunnel_port is None:
        return "it has not joined: run `sollol agent join` there"
    if rpc.build is None:
        return "it has no ggml-rpc-server"
    if build is not None and rpc.build != build:
        return f"its ggml-rpc-server is build {rpc.build}, the coordinator's llama-server is build {build}"
    if report.sample_age_s > STALE_S:
        return f"its report is {report.sample_age_s:.0f} s old"
    old = next((part for part in ("host", "gpus", "rpc") if part in report.stale), None)
    return f"its report is old: {report.stale[old]}" if old else None


def _devices(name: str, report: Report, freed: Mapping[str, int]) -> list[Device]:
    """The devices of a host, those that share one memory only once: the GPU, which is the faster."""
    rpc = report.rpc
    offered = list(rpc.devices) if rpc is not None else []
    lends_bytes = rpc.lends_bytes if rpc is not None else None
    if not offered and lends_bytes is None:
        offered = [_cpu(report)]
    unified = any(_vendor(device, report) == "apple" for device in offered)
    devices = []
    for device in offered:
        if unified and device.kind == "cpu":
            continue
        more = freed.get(device.name, 0)
        # What the owner lends may be far less than what is free: the margin is off the latter.
        free_bytes = min(
            device.memory_free_bytes + more, _really_free_bytes(device, report) + more - margin_bytes(device)
        )
        if lends_bytes is not None:
            free_bytes = min(free_bytes, lends_bytes)
        if free_bytes > 0:
            speed_bytes_s = _bandwidth_bytes_s(device, report)
            devices.append(Device(name, device.name, device.kind, free_bytes, speed_bytes_s))
    return devices


def _really_free_bytes(device: RpcDevice, report: Report) -> int:
    """What is free on ``device``, whatever of it its owner lends."""
    ram_bytes = report.host.ram_available_bytes
    if device.kind == "cpu":
        return ram_bytes
    gpu = next((gpu for gpu in report.gpus if gpu.index == device.gpu_index), None)
    if gpu is None:
        return device.memory_free_bytes
    # An Apple GPU may wire less than is free, and no more than is free in the RAM that it shares.
    return min(gpu.memory_free_bytes, ram_bytes) if gpu.vendor == "apple" else gpu.memory_free_bytes


def margin_bytes(device: RpcDevice) -> int:
    """What of ``device`` is left to others; on a GPU also to the context of the process that computes."""
    margin = min(MARGIN_BYTES, int(MARGIN_SHARE * device.memory_total_bytes))
    return margin + (min(GPU_CONTEXT_BYTES, margin) if device.kind == "gpu" else 0)


def _cpu(report: Report) -> RpcDevice:
    """The coordinator's own CPU where nobody listed its devices: llama-server can always compute there."""
    return RpcDevice(
        name="CPU",
        kind="cpu",
        memory_total_bytes=report.host.ram_total_bytes,
        memory_free_bytes=report.host.ram_available_bytes,
    )


def _vendor(device: RpcDevice, report: Report) -> str | None:
    return next((gpu.vendor for gpu in report.gpus if gpu.index == device.gpu_index), None)


def _bandwidth_bytes_s(device: RpcDevice, report: Report) -> float:
    """As measured or told by the driver, else what is usual."""
    if device.memory_bandwidth_bytes_s:
        return device.memory_bandwidth_bytes_s
    if device.kind == "cpu":
        return report.host.memory_bandwidth_bytes_s or CPU_BANDWIDTH_BYTES_S
    return GPU_BANDWIDTH_BYTES_S.get(_vendor(device, report) or "", min(GPU_BANDWIDTH_BYTES_S.values()))
