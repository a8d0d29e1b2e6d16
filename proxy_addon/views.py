"""What the proxy says of itself and its fleet, as JSON-ready data: pure functions.

:func:`dashboard` has the seed's fields and types exactly; the others are for ``sollol status`` and people.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from agent.ollama import names
from proxy_addon import load
from proxy_addon.admission.waiter import Standing
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.telemetry import Tally, Telemetry

MIB = 1 << 20
AT_A_GLANCE = 5  #: of those that wait; all are at /sollol/queue


def condition(fleet: Fleet, now_s: float) -> str:
    """``healthy`` with every node up, ``unhealthy`` with none, ``degraded`` between."""
    up, known = len(fleet.up(now_s)), len(fleet.nodes)
    return "unhealthy" if up == 0 else "healthy" if up == known else "degraded"


def dashboard(fleet: Fleet, telemetry: Telemetry, now_s: float) -> dict[str, Any]:
    """``GET /api/dashboard``. Latencies are those of recent requests, ``gpu_free_mem`` is in MiB."""
    tallies = [telemetry.tallies.get(node.name, Tally()) for node in fleet]
    recent_s = [latency_s for tally in tallies for latency_s in tally.latencies_s]
    total = Tally(sum(t.served for t in tallies), sum(t.failed for t in tallies))
    return {
        "status": condition(fleet, now_s),
        "total_hosts": len(fleet.nodes),
        "available_hosts": len(fleet.up(now_s)),
        "total_requests": telemetry.finished,
        "avg_latency_ms": round(1000 * sum(recent_s) / len(recent_s), 1) if recent_s else 0.0,
        "success_rate": round(total.success_rate(), 4),
        "queue_depth": sum(telemetry.depth().values()),
        "hosts": [
            {
                "host": node.name,
                "available": node.up(now_s),
                "latency_ms": round(1000 * tally.mean_latency_s(), 1),
                "success_rate": round(tally.success_rate(), 4),
                "gpu_free_mem": (load.gpu_free_bytes(node) or 0) // MIB,
                "current_load": round(load.utilisation(node), 3),
                "requests_handled": tally.served,
            }
            for node, tally in zip(fleet, tallies, strict=True)
        ],
    }


def status(
    fleet: Fleet, telemetry: Telemetry, policy: str, standings: Iterable[Standing], now_s: float
) -> dict[str, Any]:
    """``GET /sollol/status``: the fleet at a glance; models are counted, and who waits first is named."""
    rows = nodes(fleet, telemetry, now_s)
    for row in rows:
        row["models"] = len(row["models"])
        if row["shard"] is not None:
            row["shard"] = {"loads": row["shard"]["loads"]}
    return {
        "status": condition(fleet, now_s),
        "policy": policy,
        "requests": telemetry.finished,
        "in_flight": sum(node.own_flights for node in fleet),
        "queue_depth": sum(telemetry.depth().values()),
        "queue": queue(islice(standings, AT_A_GLANCE)),
        "pins": fleet.pins,
        "replicas": fleet.replicas,
        "nodes": rows,
    }


def queue(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """``GET /sollol/queue``: who waits, the next one first; of a request only what it is for."""
    return [
        {
            "id": one.waiter.id,
            "client": one.waiter.client,
            "model": names.display(one.waiter.ask.key),
            "priority": one.waiter.priority,
            "position": one.position,
            "waited_s": round(one.waited_s, 3),
            "expected_wait_s": round(one.expected_wait_s, 3),
        }
        for one in standings
    ]


def nodes(fleet: Fleet, telemetry: Telemetry, now_s: float) -> list[dict[str, Any]]:
    """``GET /sollol/nodes``: everything that is known of each node."""
    return [_node(node, telemetry.tallies.get(node.name, Tally()), now_s) for node in fleet]


def _node(node: Node, tally: Tally, now_s: float) -> dict[str, Any]:
    state, why = _state(node, now_s)
    return {
        "name": node.name,
        "kind": node.kind,
        "source": node.source,
        "agent": node.agent_url,
        "state": state,
        "why": why,
        "version": node.version,
        "parallel": node.parallel,
        "in_flight": node.own_flights,
        "in_flight_elsewhere": len(node.foreign),  # of other proxies, as the agent tells
        "served": tally.served,
        "failed": tally.failed,
        "success_rate": round(tally.success_rate(), 4),
        "latency_s": round(tally.mean_latency_s(), 6),
        "poll_age_s": None if node.polled_s is None else round(now_s - node.polled_s, 3),
        "poll_latency_s": node.poll_latency_s,
        "resident": [
            row.model_dump(mode="json", include={"name", "size", "size_vram", "context_length", "expires_at"})
            for row in node.resident.values()
        ],
        "remarks": [
            f"{row.name} is {max(100 * on_cpu / row.size, 1):.0f} % on the CPU"
            for row, on_cpu in load.offloaded(node)
        ],
        "models": [
            row.model_dump(mode="json", include={"name", "size", "digest"}) for row in node.models.values()
        ],
        "gpus": [
            gpu.model_dump(include={"name", "memory_total_bytes", "memory_free_bytes", "utilisation"})
            for gpu in (node.report.gpus if node.report else ())
        ],
        "cpu_utilisation": node.report.host.cpu_utilisation if node.report else None,
        "stale": node.report.stale if node.report else {},
        "shard": node.report.shard.model_dump(mode="json") if node.report and node.report.shard else None,
    }


def _state(node: Node, now_s: float) -> tuple[str, str | None]:
    """One word for how the node is, and why where it is not simply up."""
    if node.leaving:
        return "leaving", "its name or announcement is gone"
    if node.poll_error is not None:
        return "down", node.poll_error
    if node.polled_s is None:
        return "new", "not looked at yet"
    if node.health.ejected(now_s):
        left_s = node.health.ejected_until_s - now_s
        return "ejected", f"{node.health.reason or 'requests failed'}; again in {left_s:.0f} s"
    if now_s < node.full_until_s:
        return "full", "it answered 503"
    return (
        ("up", None) if node.health.allowance is None else ("returning", f"{node.health.allowance} at a time")
    )
