"""A coordinator's own metrics, made when somebody scrapes: loads, and what every device holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent.report import ShardLoad
from shard.coordinator import Coordinator
from shard.node import Node

_PREFIX = "sollol_shard_"
_LABELS = ("model", "node", "device")


def collector(coordinator: Coordinator, node: Node) -> Callable[[], Iterable[Metric]]:
    """Return what to call for the metrics of ``coordinator`` and the ``node`` that it serves."""

    def collect() -> Iterator[Metric]:
        yield from of_loads(coordinator.loads())
        yield CounterMetricFamily(f"{_PREFIX}plans", "Plans made since the start.", coordinator.plans_made)
        yield CounterMetricFamily(
            f"{_PREFIX}replans", "Of these, those that followed a failure.", coordinator.replans_made
        )
        yield CounterMetricFamily(
            f"{_PREFIX}errors", "Requests that ended in a fault of the coordinator.", node.faults
        )

    return collect


def of_loads(loads: Iterable[ShardLoad]) -> Iterator[Metric]:
    """Yield the metrics of models that are loading or loaded."""
    progress = GaugeMetricFamily(f"{_PREFIX}load_progress_ratio", "How much is loaded.", labels=("model",))
    expected = GaugeMetricFamily(f"{_PREFIX}device_planned_bytes", "Memory by plan.", labels=_LABELS)
    used = GaugeMetricFamily(f"{_PREFIX}device_used_bytes", "Memory as llama.cpp says.", labels=_LABELS)
    layers = GaugeMetricFamily(f"{_PREFIX}device_layers", "Layers that lie there.", labels=_LABELS)
    token = GaugeMetricFamily(f"{_PREFIX}device_planned_seconds_per_token", "Time by plan.", labels=_LABELS)
    for load in loads:
        progress.add_metric((load.model,), load.progress)
        for share in load.plan.shares if load.plan else ():
            labels = (load.model, share.node, share.device)
            expected.add_metric(labels, share.memory_bytes)
            layers.add_metric(labels, share.layers)
            token.add_metric(labels, share.ms_per_token / 1000)
            if share.used_bytes is not None:
                used.add_metric(labels, share.used_bytes)
    yield from (progress, expected, used, layers, token)
