"""What a node is doing now: pure functions on :class:`Node`."""

from __future__ import annotations

from proxy_addon.fleet.node import Node


def health(node: Node, now_s: float) -> float:
    """1 for a node that takes work, 0.5 for one that is coming back, 0 for one that is out."""
    if not node.up(now_s):
        return 0.0
    return 1.0 if node.health.allowance is None else 0.5


def gpu_free_bytes(node: Node) -> int | None:
    """Free memory of all its GPUs; None where no agent tells."""
    return sum(gpu.memory_free_bytes for gpu in node.report.gpus) if node.report else None


def utilisation(node: Node) -> float:
    """Busy share of its CPU (the seed's ``load``); where no agent tells, of its slots; 0 to 1."""
    if node.report and node.report.host.cpu_utilisation is not None:
        return node.report.host.cpu_utilisation
    return min(1.0, len(node.flights) / max(1, node.parallel))
