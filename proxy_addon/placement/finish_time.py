"""The policy ``finish_time``: the node that is expected to finish the request first, in seconds.

``finish = queue wait + load + prefill + decode``, from measured speeds (learning.py), plus what the choice is
expected to cost beyond the request itself: the reload of evicted models, and failed attempts.
"""

from __future__ import annotations

from proxy_addon.fleet import hardware
from proxy_addon.fleet.learning import Estimate, slowdown
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.runner import Start, load_left_s, loading, queue
from proxy_addon.placement.scene import Place, Scene

EVICTED_IS_WANTED = 0.5  #: probability that an evicted model is asked for again and must be loaded
WORK_LOST = 0.5  #: share of the work that is done when an attempt fails


class FinishTime:
    """Minimises the expected seconds until the last byte."""

    def bounds(self, scene: Scene) -> list[float]:
        """Load and work at the best conceivable speed, without any wait."""
        key, prompt, output = scene.ask.key, scene.prompt_tokens, scene.output_tokens
        return [
            prompt * place.s_per_prompt_token
            + output * place.s_per_output_token
            + (0.0 if place.node.in_use.get(key) else place.absent_load_s)
            for place in scene.places
        ]

    def judge(self, scene: Scene, place: Place, start: Start) -> Candidate:
        """The sum of wait_s, load_s, prefill_s, decode_s, evict_s and failure_s."""
        node, key, now_s, estimate = place.node, scene.ask.key, scene.now_s, place.estimate
        free_s = queue(node.flights, key, place.slots, now_s) if node.flights else [0.0]
        wait_s, load_s = min(free_s), 0.0
        if start.loading is not None:
            load_s = load_left_s(start.loading, now_s)
        elif start.loads:
            load_s = estimate.load_s
            if node.flights:
                wait_s = max(_load_wait_s(place, start, now_s), max(free_s))
        beside = _beside(place, key) if node.flights else 0
        offload = 1.0
        if start.gpu_share < 1:
            offload = hardware.offload_slowdown(start.gpu_share, estimate.hardware.cpu_slowdown)
        prefill_s = scene.prompt_tokens * place.s_per_prompt_token * offload
        decode_s = scene.output_tokens * place.s_per_output_token * offload * slowdown(beside)
        evict_s = _evict_s(place, start, estimate) if start.evicts else 0.0
        odds = scene.speeds.failure_odds(place.name, now_s)
        lost_s = scene.speeds.lost_s(place.name) + WORK_LOST * (load_s + prefill_s + decode_s)
        failure_s = odds * lost_s
        total_s = wait_s + load_s + prefill_s + decode_s + evict_s + failure_s
        terms = {
            "wait_s": wait_s,
            "load_s": load_s,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "evict_s": evict_s,
            "failure_s": failure_s,
        }
        return Candidate(place.name, None, total_s, terms, start.notes)

    def explain(self, chosen: Candidate) -> str:
        """The seconds and what they are made of."""
        parts = ", ".join(
            f"{name[:-2]} {value:.2f}" for name, value in chosen.terms.items() if value >= 0.005
        )
        return f"expected to finish first, in {chosen.cost:.2f} s ({parts or 'nothing to do'})"


def _load_wait_s(place: Place, start: Start, now_s: float) -> float:
    """Loads before ours, and the requests of those models that must make room; both at the same time."""
    node = place.node
    waits = [load_left_s(flight, now_s) for flight in loading(node, place.room)]
    for model in start.drains:
        waits.append(max(queue(node.flights, model, max(node.parallel, 1), now_s)))
    return max(waits, default=0.0)


def _beside(place: Place, key: str) -> int:
    """How many other sequences the node will be decoding while it works on ours."""
    node = place.node
    ours = min(node.in_use[key], place.slots - 1)
    return ours + sum(min(count, node.parallel) for model, count in node.in_use.items() if model != key)


def _evict_s(place: Place, start: Start, estimate: Estimate) -> float:
    evicted = sum(place.node.resident[name].size for name in start.evicts)
    return EVICTED_IS_WANTED * evicted / estimate.load_bytes_s
