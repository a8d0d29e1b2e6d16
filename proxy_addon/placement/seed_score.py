"""The policy ``score``: the founding document's product of factors ("Multi-Factor Node Scoring Algorithm").

100 × success rate ÷ (1 + latency in s) × 1.5 with a GPU that is wanted ÷ (1 + load) ÷ (1 + |priorities| ÷ 10)
× 1.2 on a node that specialises in the task. The document's worked example prints 109.3 and 83.5 for factors
whose products are 109.4 and 83.3; the formula is what counts here, and the winner is the same.

The document's ``cpu_load`` becomes the busier of CPU and slots: an LLM node's CPU idles while its GPU works.
A GPU is wanted where the analysis of the request says so, and for generation unless the prompt is "simple".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.scene import Place, Scene
from proxy_addon.placement.survey import prefers

UNKNOWN_LATENCY_S = 0.1  #: the document's default
GPU_TOKENS = 100  #: a prompt below it is "simple" in the document's estimate of complexity


@dataclass(frozen=True, slots=True)
class Factors:
    """The document's inputs, gate aside: only nodes that may serve are scored."""

    success_rate: float = 1.0
    latency_s: float = UNKNOWN_LATENCY_S
    load: float = 0.0
    priority: int = 5
    task_priority: int = 5
    gpu_wanted: bool = False
    gpu_free: bool = False
    specialised: bool = False

    def score(self) -> float:
        """The score, higher is better."""
        return score(
            self.success_rate,
            self.latency_s,
            self.load,
            abs(self.priority - self.task_priority),
            self.gpu_wanted and self.gpu_free,
            self.specialised,
        )


def score(
    success_rate: float, latency_s: float | None, load: float, distance: int, gpu: bool, specialised: bool
) -> float:
    """The document's formula."""
    found = 100.0 * success_rate / (1 + (UNKNOWN_LATENCY_S if latency_s is None else latency_s))
    if gpu:
        found *= 1.5
    found /= 1 + load
    if distance:
        found /= 1 + distance / 10
    return found * 1.2 if specialised else found


def gpu_wanted(ask: AskFeatures) -> bool:
    """Whether the document would give the request a node with a GPU for preference."""
    return ask.requires_gpu or (ask.kind != "embedding" and ask.prompt_tokens >= GPU_TOKENS)


def factors(ask: AskFeatures, row: Features) -> Factors:
    """What the document calls host metadata and context."""
    return Factors(
        success_rate=row.success_rate,
        latency_s=UNKNOWN_LATENCY_S if row.poll_latency_s is None else row.poll_latency_s,
        load=max(row.cpu_utilisation or 0.0, row.in_flight / row.parallel),
        priority=row.priority,
        task_priority=ask.priority,
        gpu_wanted=gpu_wanted(ask),
        gpu_free=row.gpu_free_bytes > 0,
        specialised=row.preferred,
    )


class SeedScore:
    """Maximises the founding document's score."""

    def cost(self, ask: AskFeatures, row: Features) -> float:
        """The negative score; that of a node that others are set to relieve, as many times smaller."""
        found = score(
            row.success_rate,
            row.poll_latency_s,
            max(row.cpu_utilisation or 0.0, row.in_flight / row.parallel),
            abs(row.priority - ask.priority),
            row.gpu_free_bytes > 0 and gpu_wanted(ask),
            row.preferred,
        )
        return -found / ask.specialise_factor if row.outside else -found

    def terms(self, ask: AskFeatures, row: Features) -> dict[str, float]:
        """The inputs of the score."""
        found = factors(ask, row)
        return {
            "success_rate": found.success_rate,
            "latency": found.latency_s,
            "load": found.load,
            "priority_distance": float(abs(found.priority - found.task_priority)),
            "gpu": float(found.gpu_wanted and found.gpu_free),
            "specialised": float(found.specialised),
        }

    def explain(self, ask: AskFeatures, row: Features) -> str:
        """The score."""
        return f"has the highest score, {-self.cost(ask, row):.1f}"

    def bounds(self, scene: Scene, places: Sequence[Place]) -> list[float]:
        """The negative scores themselves, but for what others relieve a node of."""
        wanted, priority, ask, found = gpu_wanted(scene.features), scene.features.priority, scene.ask, []
        for place in places:
            node, machine = place.node, place.machine
            load = len(node.flights) / node.parallel if node.flights else 0.0
            if machine.cpu_utilisation is not None and machine.cpu_utilisation > load:
                load = machine.cpu_utilisation
            found.append(
                -score(
                    place.success_rate,
                    node.poll_latency_s,
                    load,
                    abs(node.priority - priority),
                    wanted and machine.gpu_free_bytes > 0,
                    bool(node.preferred_tasks) and prefers(node, ask),
                )
            )
        return found
