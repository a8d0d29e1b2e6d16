"""What several workers say, as one would: pure functions from their answers, by number, to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

AT_A_GLANCE = 5  #: of those that wait, in the status
OF_A_WORKER = ("pid", "requests", "in_flight", "queue_depth")  #: in the status
Json = dict[str, Any]
Answers = Mapping[int, Json]


def status(told: Answers) -> Json:
    """``/sollol/status``: sums, and a row for each worker. What the first one does for all is as it says."""
    first = next(iter(told.values()))
    return first | {
        **_sums(told, "requests", "in_flight", "queue_depth"),
        "queue": _line(told)[:AT_A_GLANCE],
        "nodes": _nodes(told),
        "reload": _reload(told),
        "workers": [
            {"worker": number} | {name: each[name] for name in OF_A_WORKER} for number, each in told.items()
        ],
    }


def nodes(told: Answers) -> Json:
    """``/sollol/nodes``."""
    return {"nodes": _nodes(told)}


def queue(told: Answers) -> Json:
    """``/sollol/queue``: each worker has a line of its own; who stands alike stands together."""
    return {"queue": _line(told)}


def decisions(told: Answers) -> Json:
    """``/sollol/decisions``, of requests or of notes: the newest first."""
    (name,) = next(iter(told.values())).keys()
    by_id = {entry["id"]: entry for each in told.values() for entry in each[name]}
    return {name: sorted(by_id.values(), key=lambda entry: str(entry.get("at")), reverse=True)}


def dashboard(told: Answers) -> Json:
    """``/api/dashboard``."""
    first = next(iter(told.values()))
    weights = [each["total_requests"] for each in told.values()]
    return first | {
        **_sums(told, "total_requests", "queue_depth"),
        "avg_latency_ms": round(_mean([each["avg_latency_ms"] for each in told.values()], weights), 1),
        "success_rate": round(_mean([each["success_rate"] for each in told.values()], weights), 4),
        "hosts": [_host(rows) for rows in _by(told, "hosts", "host")],
    }


def metrics(told: Mapping[int, str]) -> tuple[bytes, str]:
    """``/metrics``: every sample with the label ``worker``; and the content type."""
    families: dict[str, Metric] = {}
    for number, text in told.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                sample._replace(labels=sample.labels | {"worker": str(number)}) for sample in family.samples
            ]
    encode, content_type = choose_encoder("")
    return encode(_Collected(families.values())), content_type


#: path → how the answers of several workers become one.
MERGES: dict[str, Callable[[Answers], Json]] = {
    "/sollol/status": status,
    "/sollol/nodes": nodes,
    "/sollol/queue": queue,
    "/sollol/decisions": decisions,
    "/api/dashboard": dashboard,
}


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _sums(told: Answers, *names: str) -> dict[str, int]:
    return {name: sum(each[name] for each in told.values()) for name in names}


def _mean(values: list[float], weights: list[int]) -> float:
    """The weighted mean; the first value where nothing weighs."""
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else values[0]


def _by(told: Answers, name: str, key: str) -> list[list[Json]]:
    """The rows of all workers' lists ``name`` that have the same ``key``."""
    groups: dict[str, list[Json]] = {}
    for each in told.values():
        for row in each[name]:
            groups.setdefault(row[key], []).append(row)
    return list(groups.values())


def _nodes(told: Answers) -> list[Json]:
    return [_node(rows) for rows in _by(told, "nodes", "name")]


def _node(rows: list[Json]) -> Json:
    first = rows[0]
    served, failed = sum(row["served"] for row in rows), sum(row["failed"] for row in rows)
    in_flight = sum(row["in_flight"] for row in rows)
    # To each worker the others are other proxies.
    elsewhere = first["in_flight_elsewhere"] - (in_flight - first["in_flight"])
    latency_s = _mean([row["latency_s"] for row in rows], [row["served"] for row in rows])
    return first | {
        "in_flight": in_flight,
        "in_flight_elsewhere": max(elsewhere, 0),
        "served": served,
        "failed": failed,
        "success_rate": round(served / (served + failed), 4) if served + failed else 1.0,
        "latency_s": round(latency_s, 6),
    }


def _host(rows: list[Json]) -> Json:
    weights = [row["requests_handled"] for row in rows]
    return rows[0] | {
        "requests_handled": sum(weights),
        "latency_ms": round(_mean([row["latency_ms"] for row in rows], weights), 1),
        "success_rate": round(_mean([row["success_rate"] for row in rows], weights), 4),
    }


def _line(told: Answers) -> list[Json]:
    waiting = [row for each in told.values() for row in each["queue"]]
    waiting.sort(key=lambda row: (row["position"], -row["waited_s"]))
    return [row | {"position": place} for place, row in enumerate(waiting, 1)]


def _reload(told: Answers) -> Json | None:
    return next((each["reload"] for each in told.values() if each["reload"] is not None), None)
