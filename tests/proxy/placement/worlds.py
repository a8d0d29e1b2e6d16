"""Small fleets for tests of placement: nodes, rows, reports and asks in a line each."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from agent.report import Gpu, Host, Model, Ollama, Report, Resident
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Decision

GIB = 1 << 30
NOW_S = 1000.0
DAY = datetime(2026, 1, 1, tzinfo=UTC)


def ask(
    key: str = "m", path: str = "/api/chat", prompt_tokens: int = 200, num_ctx: int | None = None, **more: Any
) -> Ask:
    endpoint = match(path)
    assert endpoint is not None
    reload_key = (("num_ctx", num_ctx),) if num_ctx is not None else ()
    more = {"reload_key": reload_key, "stream": True} | more
    return Ask(endpoint, key, key, prompt_tokens=prompt_tokens, num_ctx=num_ctx, **more)


def row(size_gib: float = 4, digest: str = "d", **details: Any) -> Model:
    return Model(
        name="m",
        modified_at=DAY,
        size=int(size_gib * GIB),
        digest=digest,
        details={"family": "llama"} | details,
    )


def resident(size_gib: float = 5, on_gpu: float = 1.0, context: int | None = 4096) -> Resident:
    size = int(size_gib * GIB)
    return Resident(name="m", size=size, size_vram=int(size * on_gpu), context_length=context)


def report(
    gpu_gib: float = 8,
    free_gib: float | None = None,
    ram_gib: float = 16,
    bandwidth: float | None = 500e9,
    vendor: str = "nvidia",
) -> Report:
    total, free = int(gpu_gib * GIB), int((gpu_gib if free_gib is None else free_gib) * GIB)
    gpu: dict[str, Any] = {
        "index": 0,
        "name": "GPU",
        "vendor": vendor,
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "memory_used_bytes": total - free,
        "memory_bandwidth_bytes_s": bandwidth,
    }
    ram = int(ram_gib * GIB)
    return Report(
        agent_version="0",
        node_id="n",
        sampled_at=DAY,
        sample_age_s=0,
        host=Host(hostname="n", cpu_count=8, ram_total_bytes=ram, ram_available_bytes=ram),
        gpus=[Gpu(**gpu)] if gpu_gib else [],
        ollama=Ollama(url="http://127.0.0.1:11434", reachable=True),
    )


def node(fleet: Fleet, number: int, **fields: Any) -> Node:
    """Node ``10.0.0.NUMBER:11434``: up, with an 8 GiB GPU, holding ``m`` of 4 GiB unless told otherwise."""
    defaults: dict[str, Any] = {"polled_s": NOW_S, "models": {"m": row()}, "report": report()}
    return fleet.add(Node(f"10.0.0.{number}", 11434, **(defaults | fields)))


def name(number: int) -> str:
    return f"10.0.0.{number}:11434"


def told(made: Decision) -> tuple[Any, ...]:
    """All that people and the journal get to see of a decision, as precise as the journal has it."""
    candidates = [
        (
            candidate.node,
            candidate.excluded,
            round(candidate.cost, 6),
            {term: round(value, 6) for term, value in candidate.terms.items()},
            candidate.notes,
        )
        for candidate in made.candidates
    ]
    return made.policy, made.node, made.reason, candidates
