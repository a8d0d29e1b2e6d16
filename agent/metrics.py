"""A report as Prometheus metrics, made when somebody scrapes and never before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent.report import Gpu, Host, Report, Rpc, RpcDevice, RpcServer

# Metric → (help, how to read it). A None is left out: unknown is not zero.
_HOST: dict[str, tuple[str, Callable[[Host], float | None]]] = {
    "cpu_utilisation_ratio": ("Busy share of all CPUs.", lambda host: host.cpu_utilisation),
    "load1": ("Load average over one minute.", lambda host: host.load_1m),
    "ram_total_bytes": ("Main memory.", lambda host: host.ram_total_bytes),
    "ram_available_bytes": ("Main memory that is available.", lambda host: host.ram_available_bytes),
    "memory_bandwidth_bytes_per_second": (
        "Main memory that all threads together can read, as measured.",
        lambda host: host.memory_bandwidth_bytes_s,
    ),
    "model_store_total_bytes": (
        "Size of the file system that holds the models.",
        lambda host: host.model_store.total_bytes if host.model_store else None,
    ),
    "model_store_free_bytes": (
        "Free bytes of the file system that holds the models.",
        lambda host: host.model_store.free_bytes if host.model_store else None,
    ),
}
_GPU: dict[str, tuple[str, Callable[[Gpu], float | None]]] = {
    "memory_total_bytes": ("Memory of the GPU.", lambda gpu: gpu.memory_total_bytes),
    "memory_free_bytes": ("Free memory of the GPU.", lambda gpu: gpu.memory_free_bytes),
    "memory_used_bytes": ("Used memory of the GPU.", lambda gpu: gpu.memory_used_bytes),
    "utilisation_ratio": ("Busy share of the last sample period.", lambda gpu: gpu.utilisation),
    "temperature_celsius": ("Temperature of the GPU.", lambda gpu: gpu.temperature_c),
    "power_watts": ("Power that the GPU draws.", lambda gpu: gpu.power_w),
    "power_limit_watts": ("Power that the GPU may draw.", lambda gpu: gpu.power_limit_w),
    "memory_bandwidth_bytes_per_second": (
        "Peak memory bandwidth.",
        lambda gpu: gpu.memory_bandwidth_bytes_s,
    ),
}
_GPU_LABELS = ("gpu", "name", "uuid")
_RPC_DEVICE: dict[str, tuple[str, Callable[[RpcDevice], float]]] = {
    "memory_total_bytes": (
        "Memory of a device that is lent to sharded models.",
        lambda device: device.memory_total_bytes,
    ),
    "memory_free_bytes": ("What of it can still be lent.", lambda device: device.memory_free_bytes),
}
_RPC_SERVER: dict[str, tuple[str, Callable[[RpcServer], float]]] = {
    "running": ("Whether an rpc-server runs, 0 if stopped.", lambda server: server.state == "running"),
    "memory_bytes": ("Memory that an rpc-server holds.", lambda server: server.memory_bytes),
}
_RPC_SERVER_LABELS = ("device", "coordinator", "port")
_PREFIX = "sollol_agent_"


def from_report(report: Report) -> Iterator[Metric]:
    """Yield every metric that ``report`` holds."""
    info = GaugeMetricFamily(
        f"{_PREFIX}info", "The node.", labels=("node", "kind", "version", "ollama_version")
    )
    labels = (report.node_id, report.kind, report.agent_version, report.ollama.version or "")
    info.add_metric(labels, 1)
    yield info
    yield GaugeMetricFamily(f"{_PREFIX}sample_age_seconds", "Age of the sample.", report.sample_age_s)
    for name, (text, read_host) in _HOST.items():
        if (value := read_host(report.host)) is not None:
            yield GaugeMetricFamily(f"{_PREFIX}host_{name}", text, value)
    for name, (text, read_gpu) in _GPU.items():
        values = [(gpu, value) for gpu in report.gpus if (value := read_gpu(gpu)) is not None]
        if values:
            family = GaugeMetricFamily(f"{_PREFIX}gpu_{name}", text, labels=_GPU_LABELS)
            for gpu, value in values:
                family.add_metric((str(gpu.index), gpu.name, gpu.uuid or ""), value)
            yield family
    yield from _ollama(report)
    if report.rpc is not None:
        yield from _rpc(report.rpc)
    stale = GaugeMetricFamily(
        f"{_PREFIX}stale", "1 for every part of the report that is old.", labels=("part",)
    )
    for part in report.stale:
        stale.add_metric((part,), 1)
    yield stale


def _ollama(report: Report) -> Iterator[Metric]:
    ollama = report.ollama
    yield GaugeMetricFamily(
        f"{_PREFIX}ollama_up", "Whether Ollama answers.", 1.0 if ollama.reachable else 0.0
    )
    yield GaugeMetricFamily(f"{_PREFIX}ollama_models", "Models on disk.", len(ollama.models))
    for attribute, text in (("size", "Memory of a resident model."), ("size_vram", "Of that, on GPUs.")):
        family = GaugeMetricFamily(f"{_PREFIX}ollama_resident_{attribute}_bytes", text, labels=("model",))
        for resident in ollama.resident:
            family.add_metric((resident.name,), getattr(resident, attribute))
        yield family
    counts = {
        "connections": ("Established TCP connections to Ollama.", ollama.connections),
        "requests_in_flight": ("Requests in flight, as the proxies say.", ollama.requests_in_flight),
    }
    for name, (text, value) in counts.items():
        if value is not None:
            yield GaugeMetricFamily(f"{_PREFIX}ollama_{name}", text, value)


def _rpc(rpc: Rpc) -> Iterator[Metric]:
    for name, (text, read_device) in _RPC_DEVICE.items():
        family = GaugeMetricFamily(f"{_PREFIX}rpc_device_{name}", text, labels=("device",))
        for device in rpc.devices:
            family.add_metric((device.name,), read_device(device))
        yield family
    for name, (text, read_server) in _RPC_SERVER.items():
        family = GaugeMetricFamily(f"{_PREFIX}rpc_server_{name}", text, labels=_RPC_SERVER_LABELS)
        for server in rpc.servers:
            if server.state != "exited":  # its port may be another's by now
                family.add_metric((server.device, server.coordinator, str(server.port)), read_server(server))
        yield family


def failures(parts: Iterable[Any]) -> Metric:
    """Return how often each polled part could not be read."""
    family = CounterMetricFamily(
        f"{_PREFIX}sample_failures", "Attempts to read a part that failed.", labels=("part",)
    )
    for part in parts:
        family.add_metric((part.part,), part.failures)
    return family
