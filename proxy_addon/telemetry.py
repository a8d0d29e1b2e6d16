"""Prometheus metrics of the proxy: the seed's names, and the conventional ones beside them.

Declared once, in :meth:`Telemetry.__init__`, on a registry of their own, so that two proxies in one process
do not count into each other. Counters are moved by :meth:`Telemetry.observe` when a request ends; what the
fleet knows anyway is read from it when somebody scrapes. Labels are bounded: hosts are nodes, a model that
no node has is ``other``.
"""

from __future__ import annotations

import asyncio
import collections
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from agent.ollama import names
from agent.report import ShardPlan
from proxy_addon import load
from proxy_addon.fleet import coordinators
from proxy_addon.fleet.node import Fleet
from proxy_addon.record import Record
from proxy_addon.reload import Outcome
from proxy_addon.totals import Spread, Total

NO_HOST = "none"  #: the request reached no node
OTHER = "other"
PRIORITIES = range(1, 11)
WINDOW = 500  #: latencies kept per node, for quantiles and means of the recent past
QUANTILES = (0.5, 0.9, 0.99)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
QUEUE_WAIT_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST_BYTE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

#: The record's outcome → the seed's ``status`` label and the two it does not know.
STATUS = {
    "ok": "success",
    "client_left": "cancelled",
    "refused": "refused",
    "failed": "failure",
    "cut": "failure",
}

#: Ends of an attempt that say nothing about whether the node works: it was full, right to refuse, …
NEUTRAL = frozenset({"client_left", "refused", "full", "stale", "too_small", "moved", "answer"})


@dataclass(slots=True)
class Tally:
    """What one node has done for us since the proxy started."""

    served: int = 0
    failed: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  #: of served attempts
    latency_sum_s: float = 0.0

    def success_rate(self) -> float:
        """Share of attempts that were served, 1 where there were none."""
        return self.served / (self.served + self.failed) if self.served + self.failed else 1.0

    def mean_latency_s(self) -> float:
        """Mean of the last :data:`WINDOW` served attempts, 0 where there were none."""
        return sum(self.latencies_s) / len(self.latencies_s) if self.latencies_s else 0.0


def quantile(sorted_values: list[float], share: float) -> float:
    """The value below which ``share`` of ``sorted_values`` lie (nearest rank); the list is not empty."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


class Telemetry:
    """The metrics of one proxy. ``now`` is the clock of the fleet's times."""

    def __init__(
        self, fleet: Fleet, now: Callable[[], float] = lambda: asyncio.get_running_loop().time()
    ) -> None:
        self.fleet = fleet
        self.tallies: dict[str, Tally] = {}  #: by node name
        self.finished = 0  #: requests that were for a node
        self.depth: Callable[[], Mapping[int, int]] = collections.Counter  #: how many wait now, by priority
        self.probes: Mapping[str, int] = {}  #: how tries of doubtful nodes ended, and how many did
        self.under_way: Callable[[], int] = int  #: how many requests have begun and not ended
        self.tasks: Callable[[], int] = int  #: how many tasks the loop has
        self.registry = registry = CollectorRegistry()
        self._requests = Total("sollol_requests", "Requests that ended.", ("host", "model", "status"))
        self._duration = Spread(
            "sollol_request_duration_seconds",
            "Time from a request's head to its answer's end, other nodes' failures included.",
            ("host",),
            DURATION_BUCKETS_S,
        )
        self._first_byte = Spread(
            "sollol_time_to_first_byte_seconds",
            "Time from a request's head to its answer's first byte.",
            ("host",),
            FIRST_BYTE_BUCKETS_S,
        )
        registry.register(self._requests)
        registry.register(self._duration)
        registry.register(self._first_byte)
        self._retries = Counter(
            "sollol_retries", "Attempts that were followed by another one.", ("reason",), registry=registry
        )
        self._queue_wait = Spread(
            "sollol_queue_wait_seconds",
            "Time in the proxy's line, of requests that were for a node; 0 of those that found a slot free.",
            ("priority",),
            QUEUE_WAIT_BUCKETS_S,
        )
        registry.register(self._queue_wait)
        self._refused = Counter(
            "sollol_admission_refused",
            "Requests over a limit: queue_full, max_wait, in_flight, rate, shutdown.",
            ("reason",),
            registry=registry,
        )
        self._decisions = Total("sollol_decisions", "Placements decided.", ("host", "policy"))
        self._tokens = Total("sollol_tokens", "Tokens as the nodes counted them.", ("host", "model", "kind"))
        registry.register(self._decisions)
        registry.register(self._tokens)
        self._hook_errors = Counter(
            "sollol_hook_errors", "Exceptions in the proxy's own code.", ("hook",), registry=registry
        )
        self._plans = Counter(
            "sollol_shard_plans", "Plans of sharded models, replans included.", ("host",), registry=registry
        )
        self._replica_actions = Counter(
            "sollol_replica_actions",
            "Models loaded, given up or kept in memory by the proxy itself.",
            ("action",),
            registry=registry,
        )
        self._reloads = Counter(
            "sollol_config_reloads",
            "Times that the settings were read anew: applied, unchanged, refused.",
            ("result",),
            registry=registry,
        )
        self._last_reload = Gauge(
            "sollol_config_last_reload_successful",
            "Whether the settings could be read the last time: 0 while older ones are in force.",
            registry=registry,
        )
        self._last_reload.set(1)
        build = Gauge("sollol_build_info", "Versions.", ("version", "mitmproxy", "python"), registry=registry)
        build.labels(version("sollol"), version("mitmproxy"), platform.python_version()).set(1)
        registry.register(
            _FleetCollector(fleet, self.tallies, lambda: self.depth(), lambda: self.probes, now)
        )
        registry.register(_LoopCollector(lambda: self.under_way(), lambda: self.tasks()))

    def observe(self, record: Record) -> None:
        """Count a finished request; those about the proxy itself are not requests."""
        if record.endpoint is None or record.ended_s is None:
            return
        host = record.attempts[-1].node if record.attempts else NO_HOST
        model = self._model(record.ask.key if record.ask else "")
        self._requests.add((host, model, STATUS.get(record.outcome or "", "failure")))
        for decision in record.decisions:
            self._decisions.add((decision.node or NO_HOST, decision.policy))
        self._tally(record)
        if host == NO_HOST:
            return
        self.finished += 1
        if record.ask is not None and record.waiter is not None:
            self._queue_wait.add((str(record.ask.priority),), record.queued_s or 0.0)
        if record.outcome == "ok":
            self._duration.add((host,), record.ended_s - record.started_s)
        if record.first_byte_s is not None:
            self._first_byte.add((host,), record.first_byte_s - record.started_s)
        if record.stats:
            self._tokens.add((host, model, "prompt"), record.stats.prompt_tokens or 0)
            self._tokens.add((host, model, "output"), record.stats.output_tokens or 0)

    def retried(self, reason: str) -> None:
        """Count a retry; ``reason`` is the retry table's word."""
        self._retries.labels(reason).inc()

    def planned(self, coordinator: str, plan: ShardPlan) -> None:
        """Count a plan of a sharded model."""
        self._plans.labels(coordinator).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was over a limit of admission."""
        self._refused.labels(reason).inc()

    def replica_acted(self, action: str) -> None:
        """Count a load, unload or keep of the proxy's own."""
        self._replica_actions.labels(action).inc()

    def reloaded(self, outcome: Outcome) -> None:
        """Count a reload of the settings."""
        self._reloads.labels(outcome.result).inc()
        self._last_reload.set(outcome.result != "refused")

    def hook_failed(self, hook: str) -> None:
        """Count an exception in ``hook``."""
        self._hook_errors.labels(hook).inc()

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that the scraper's Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _tally(self, record: Record) -> None:
        for attempt in record.attempts:
            if attempt.outcome in NEUTRAL:
                continue
            tally = self.tallies.get(attempt.node)
            if tally is None:
                tally = self.tallies[attempt.node] = Tally()
            if attempt.outcome != "ok":
                tally.failed += 1
                continue
            tally.served += 1
            if attempt.ended_s is not None:
                tally.latencies_s.append(attempt.ended_s - attempt.started_s)
                tally.latency_sum_s += attempt.ended_s - attempt.started_s

    def _model(self, key: str) -> str:
        """The label for a canonical name: clients can make up any number of names."""
        for node in self.fleet:
            if key in node.models:
                return names.display(key)
        return OTHER if key else ""


class _FleetCollector(Collector):
    """Gauges that are the fleet's own state, made at each scrape."""

    def __init__(
        self,
        fleet: Fleet,
        tallies: dict[str, Tally],
        depth: Callable[[], Mapping[int, int]],
        probes: Callable[[], Mapping[str, int]],
        now: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._depth = depth
        self._probes = probes
        self._tallies = tallies
        self._now = now

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the fleet, whose clock may not run yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family after the other, each with a sample per node that has a value."""
        now_s = self._now()
        health = _per_host("sollol_node_health", "1 takes work, 0.5 is coming back, 0 is out.")
        memory = _per_host("sollol_gpu_memory_free_bytes", "Free memory of all GPUs of a node.")
        in_flight = _per_host("sollol_requests_in_flight", "Requests that are on a node now.")
        for node in self._fleet:
            health.add_metric((node.name,), load.health(node, now_s))
            in_flight.add_metric((node.name,), node.own_flights)
            if (free_bytes := load.gpu_free_bytes(node)) is not None:
                memory.add_metric((node.name,), free_bytes)
        depth = GaugeMetricFamily(
            "sollol_queue_depth", "Requests that wait for a node, in the proxy.", labels=("priority",)
        )
        waiting = self._depth()
        for priority in PRIORITIES:
            depth.add_metric((str(priority),), waiting[priority])
        probes = CounterMetricFamily(
            "sollol_probes", "Tries of nodes that were believed slow or failing.", labels=("outcome",)
        )
        for outcome, count in self._probes().items():
            probes.add_metric((outcome,), count)
        yield from (health, memory, in_flight, depth, probes, self._offloaded(), self._latency())
        yield from self._sharded()

    def _offloaded(self) -> Metric:
        offloaded = GaugeMetricFamily(
            "sollol_offloaded_bytes",
            "Of a model in memory, what is not on the GPUs of a node that has some.",
            labels=("host", "model"),
        )
        for node in self._fleet:
            for row, on_cpu in load.offloaded(node):
                offloaded.add_metric((node.name, row.name), on_cpu)
        return offloaded

    def _sharded(self) -> Iterator[Metric]:
        progress = GaugeMetricFamily(
            "sollol_shard_load_progress",
            "How far the load of a sharded model is, 1 once it is ready.",
            labels=("host", "model"),
        )
        held = GaugeMetricFamily(
            "sollol_shard_device_bytes",
            "Memory of a device for a sharded model: as planned, and as measured.",
            labels=("host", "node", "device", "model", "kind"),
        )
        for coordinator in self._fleet:
            for load_ in coordinators.loads(coordinator.report):
                progress.add_metric((coordinator.name, load_.model), load_.progress)
                for share in load_.plan.shares if load_.plan is not None else ():
                    labels = (coordinator.name, share.node, share.device, load_.model)
                    held.add_metric((*labels, "expected"), share.memory_bytes)
                    if share.used_bytes is not None:
                        held.add_metric((*labels, "used"), share.used_bytes)
        yield from (progress, held)

    def _latency(self) -> Metric:
        latency = Metric(
            "sollol_latency_seconds", f"Time a node took for a request; of its last {WINDOW}.", "summary"
        )
        for host, tally in self._tallies.items():
            values = sorted(tally.latencies_s)
            for share in QUANTILES if values else ():
                labels = {"host": host, "quantile": str(share)}
                latency.add_sample("sollol_latency_seconds", labels, quantile(values, share))
            latency.add_sample("sollol_latency_seconds_count", {"host": host}, tally.served)
            latency.add_sample("sollol_latency_seconds_sum", {"host": host}, tally.latency_sum_s)
        return latency


class _LoopCollector(Collector):
    """What must come back to its base when nobody asks anything: else something is leaked."""

    def __init__(self, under_way: Callable[[], int], tasks: Callable[[], int]) -> None:
        self._under_way = under_way
        self._tasks = tasks

    def describe(self) -> list[Metric]:
        """Nothing: when this is registered, no loop runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Two gauges."""
        yield GaugeMetricFamily(
            "sollol_requests_open", "Requests of clients that have not ended.", self._under_way()
        )
        yield GaugeMetricFamily("sollol_tasks", "Tasks of the event loop.", self._tasks())


def _per_host(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=("host",))
