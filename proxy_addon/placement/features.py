"""All that any policy reads of a request and of a node, as plain numbers and words that a journal can keep.

Policies are pure functions of these two (``policies.POLICIES``), so that a choice can be made again later,
under other settings, from what was written down: ``policies.choose(policy, ask, rows)`` gives the index of
the row that wins. A :class:`Decision <proxy_addon.placement.decision.Decision>` has both as ``ask`` and
``rows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from proxy_addon.analysis import Complexity, Kind


class _Row:
    """A dataclass of numbers and words, to and from JSON."""

    __slots__ = ()

    def as_row(self) -> dict[str, Any]:
        """JSON-ready, without what has its default."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, default in _DEFAULTS[type(self)].items()
            if (value := getattr(self, name)) != default
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_row`; what is missing has its default, what is unknown is passed over.

        Raises TypeError if what has no default is missing.
        """
        return cls(
            **{
                name: tuple(row[name]) if isinstance(row[name], list) else row[name]
                for name in _DEFAULTS[cls]
                if name in row
            }
        )


@dataclass(slots=True)
class AskFeatures(_Row):
    """What a policy reads of a request."""

    prompt_tokens: float = 0.0  #: expected
    output_tokens: float = 0.0  #: expected: the mean
    output_tokens_high: float = 0.0  #: a high quantile of what they may be
    priority: int = 5
    kind: Kind = "generation"
    complexity: Complexity = "simple"
    requires_gpu: bool = False
    best_s_per_output_token: float = 0.0  #: that of the fastest node that may be considered
    specialise_factor: float = 1.0  #: how many times longer a node may take that is set to do this kind


@dataclass(slots=True)
class Features(_Row):
    """What a policy reads of one node for one request. Seconds are from now on."""

    node: str
    wait_s: float = 0.0  #: until a slot is free; where the model must be loaded, until that can begin
    load_s: float = 0.0  #: of the model; 0 where a runner can serve the request
    s_per_prompt_token: float = 0.0  #: alone, wholly on the accelerator
    s_per_output_token: float = 0.0
    offload: float = 1.0  #: how many times longer both take because a part is on the CPU
    gpu_share: float = 1.0  #: of the model on accelerators; 1 on a machine that has none
    beside: int = 0  #: other sequences of the model that the node decodes meanwhile
    runners: int = 0  #: other models at work there
    slowdown: float = 1.0  #: how many times longer an output token takes because of them
    added_slowdown: float = 0.0  #: by what share each of their tokens takes longer because of ours
    work_s: float = 0.0  #: what the requests in flight there were expected to be worked on, all together
    cached_tokens: float = 0.0  #: of the prompt, expected in the node's prefix cache
    evict_s: float = 0.0  #: loading again what must go, times the probability that it is wanted soon
    success_rate: float = 1.0
    lost_s: float = 0.0  #: that a failed attempt costs, besides its work
    in_flight: int = 0
    parallel: int = 1
    turn: int = 0  #: of all nodes' requests, the number of its last one
    poll_latency_s: float | None = None
    cpu_utilisation: float | None = None
    gpu_free_bytes: int = 0
    priority: int = 5
    preferred: bool = False  #: the node's own settings name this kind of task
    outside: bool = False  #: other nodes are set to do this kind of task, and one of them may serve
    evicts: tuple[str, ...] = ()  #: models that must go for ours
    need_bytes: int = 0  #: of memory, where ours must be loaded
    notes: tuple[str, ...] = ()  #: "resident", "reload: num_ctx 4096 → 8192", "CPU offload 40%", …


_DEFAULTS: dict[type, dict[str, Any]] = {
    kind: {field.name: field.default for field in fields(kind)} for kind in (AskFeatures, Features)
}
