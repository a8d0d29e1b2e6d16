"""What a node is doing now: pure functions on :class:`Node`."""

from __future__ import annotations

from collections.abc import Iterator

from agent.report import Resident
from proxy_addon.fleet.node import Node


def health(node: Node, now_s: float) -> float:
    """1 for a node that takes work, 0.5 for one that is coming back, 0 for one that is out."""
    if not node.up(now_s):
        return 0.0
    return 1.0 if node.health.allowance is None else 0.5


def gpu_free_bytes(node: Node) -> int | None:
    """Free memory of all its GPUs; None where no agent tells."""
    return sum(gpu.memory_free_bytes for gpu in node.report.gpus) if node.report else None


def offloaded(node: Node) -> Iterator[tuple[Resident, int]]:
    """What is in its memory and not wholly on its GPUs, and the bytes of it that the CPU computes.

    Ollama says nothing of it. A machine without GPUs is as it is, a coordinator's devices are elsewhere.
    """
    if node.report is None or not node.report.gpus or node.coordinator:
        return
    for row in node.resident.values():
        if row.size_vram < row.size:
            yield row, row.size - row.size_vram


def utilisation(node: Node) -> float:
    """Busy share of its CPU (the seed's ``load``); where no agent tells, of its slots; 0 to 1."""
    if node.report and node.report.host.cpu_utilisation is not None:
        return node.report.host.cpu_utilisation
    return min(1.0, len(node.flights) / max(1, node.parallel))
