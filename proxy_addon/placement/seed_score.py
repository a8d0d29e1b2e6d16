"""The policy ``score``: the founding document's product of factors ("Multi-Factor Node Scoring Algorithm").

100 × success rate ÷ (1 + latency in s) × 1.5 with a GPU that is wanted ÷ (1 + load) ÷ (1 + |priorities| ÷ 10)
× 1.2 on a node that specialises in the task. The document's worked example prints 109.3 and 83.5 for factors
whose products are 109.4 and 83.3; the formula is what counts here, and the winner is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Node
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.runner import Start
from proxy_addon.placement.scene import Place, Scene

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
        score = 100.0 * self.success_rate / (1 + self.latency_s)
        if self.gpu_wanted and self.gpu_free:
            score *= 1.5
        score /= 1 + self.load
        score /= 1 + abs(self.priority - self.task_priority) / 10
        return score * 1.2 if self.specialised else score


def factors(name: str, node: Node, ask: Ask, speeds: Speeds, now_s: float) -> Factors:
    """What the document calls host metadata and context, from what is known of ``node`` and ``ask``.

    The document's ``cpu_load`` becomes the busier of CPU and slots: an LLM node's CPU idles while its GPU
    works. Generation wants a GPU unless the prompt is "simple"; embeddings do not.
    """
    report = node.report
    cpu = (report.host.cpu_utilisation if report else None) or 0.0
    return Factors(
        success_rate=speeds.success_rate(name, now_s),
        latency_s=UNKNOWN_LATENCY_S if node.poll_latency_s is None else node.poll_latency_s,
        load=max(cpu, len(node.flights) / node.parallel),
        priority=node.priority,
        task_priority=ask.priority,
        gpu_wanted=ask.task is Task.GENERATE and ask.prompt_tokens >= GPU_TOKENS,
        gpu_free=report is not None and any(gpu.memory_free_bytes > 0 for gpu in report.gpus),
        specialised=str(ask.task) in node.preferred_tasks,
    )


class SeedScore:
    """Maximises the founding document's score."""

    def bounds(self, scene: Scene) -> list[float]:
        """The negative scores themselves."""
        return [-self._factors(scene, place).score() for place in scene.places]

    def judge(self, scene: Scene, place: Place, start: Start) -> Candidate:
        """The negative score, with the inputs as terms."""
        found = self._factors(scene, place)
        terms = {
            "success_rate": found.success_rate,
            "latency": found.latency_s,
            "load": found.load,
            "priority_distance": float(abs(found.priority - found.task_priority)),
            "gpu": float(found.gpu_wanted and found.gpu_free),
            "specialised": float(found.specialised),
        }
        return Candidate(place.name, None, -found.score(), terms, start.notes)

    def explain(self, chosen: Candidate) -> str:
        """The score."""
        return f"has the highest score, {-chosen.cost:.1f}"

    def _factors(self, scene: Scene, place: Place) -> Factors:
        return factors(place.name, place.node, scene.ask, scene.speeds, scene.now_s)
