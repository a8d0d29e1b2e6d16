"""The policy ``finish_time``: the node that is expected to finish the request first, in seconds.

``finish = queue wait + load + prefill + decode``, from measured speeds (learning.py), plus what the choice is
expected to cost beyond the request itself:

* evict_s: loading again what must go, be it another model or this one under other options (survey.py);
* failure_s: failed attempts, each of which costs time of its own and half of the work;
* neighbours_s: who decodes there already takes longer because of us, and their seconds count like ours;
* risk_s: an answer may be much longer than the mean, which costs most where a token takes longest, and it is
  the longest requests that users remember. So each second that a slow node could lose counts a little;
* outside_s: nodes that are set to do this kind of task may take longer than others.

Prefill is of those tokens only that are not expected in the node's prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.scene import Place, Scene

WORK_LOST = 0.5  #: share of the work that is done when an attempt fails
NEIGHBOURS = 1.0  #: what a second of others counts
RISK = 0.1  #: what a second counts that an answer of unlikely length (``output_tokens_high``) would cost

TERMS = (
    *("wait_s", "load_s", "prefill_s", "decode_s", "evict_s", "failure_s"),
    *("neighbours_s", "risk_s", "outside_s"),
)


class FinishTime:
    """Minimises the expected seconds until the last byte."""

    def cost(self, ask: AskFeatures, row: Features) -> float:
        """The sum of the terms."""
        return sum(_parts(ask, row))

    def terms(self, ask: AskFeatures, row: Features) -> dict[str, float]:
        """Each part of it; see :data:`TERMS`."""
        wait_s, load_s, prefill_s, decode_s, evict_s, failure_s, neighbours_s, risk_s, outside_s = _parts(
            ask, row
        )
        return {  # in a third of the time of a zip, and there is one for each request
            "wait_s": wait_s,
            "load_s": load_s,
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "evict_s": evict_s,
            "failure_s": failure_s,
            "neighbours_s": neighbours_s,
            "risk_s": risk_s,
            "outside_s": outside_s,
        }

    def explain(self, ask: AskFeatures, row: Features) -> str:
        """The seconds and what they are made of."""
        found = _parts(ask, row)
        parts = ", ".join(
            [f"{name[:-2]} {value:.2f}" for name, value in zip(TERMS, found, strict=True) if value >= 0.005]
        )
        return f"expected to finish first, in {sum(found):.2f} s ({parts or 'nothing to do'})"

    def bounds(self, scene: Scene, places: Sequence[Place]) -> list[float]:
        """Load and work at the best conceivable speed, without any wait."""
        key, prefix = scene.ask.key, scene.ask.prefix
        prompt, output = scene.features.prompt_tokens, scene.features.output_tokens
        return [
            (prompt if not prefix else max(prompt - scene.cached_tokens(place.node), 0.0))
            * place.s_per_prompt_token
            + output * place.s_per_output_token
            + (0.0 if key in place.node.in_use else place.absent_load_s)
            for place in places
        ]


def _parts(ask: AskFeatures, row: Features) -> tuple[float, ...]:
    """The values of :data:`TERMS`."""
    wait_s, load_s, evict_s = row.wait_s, row.load_s, row.evict_s
    token_s = row.s_per_output_token * row.offload * row.slowdown
    prompt = ask.prompt_tokens - row.cached_tokens
    prefill_s = prompt * row.s_per_prompt_token * row.offload if prompt > 0 else 0.0
    decode_s = ask.output_tokens * token_s
    failures = 1 / row.success_rate - 1  # to expect before one attempt succeeds
    failure_s = failures * (row.lost_s + WORK_LOST * (load_s + prefill_s + decode_s))
    neighbours_s = risk_s = outside_s = 0.0
    if row.added_slowdown > 0:
        neighbours_s = (
            NEIGHBOURS * row.added_slowdown * min(row.work_s, (row.beside or row.runners) * decode_s)
        )
    slower_s = token_s - ask.best_s_per_output_token
    if slower_s > 0:
        risk_s = RISK * (ask.output_tokens_high - ask.output_tokens) * slower_s
    if row.outside:
        outside_s = (ask.specialise_factor - 1) * (
            wait_s + load_s + prefill_s + decode_s + evict_s + failure_s + neighbours_s + risk_s
        )
    return wait_s, load_s, prefill_s, decode_s, evict_s, failure_s, neighbours_s, risk_s, outside_s
