"""A placement as a value: the node, every candidate with every term, and the reason in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from proxy_addon.placement.features import AskFeatures, Features


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node as the policy saw it. ``excluded`` says why it may not serve; then it has no cost."""

    node: str
    excluded: str | None = None
    cost: float = float("inf")  #: what the policy minimises: seconds, or minus the score, …
    terms: dict[str, float] = field(default_factory=dict)  #: what ``cost`` is made of; see the policy
    notes: tuple[str, ...] = ()  #: "resident", "reload: num_ctx 4096 → 8192", "CPU offload 40 %", …


@dataclass(frozen=True, slots=True)
class Decision:
    """Where one attempt of a request goes and why. ``node`` is None where nobody may serve it."""

    policy: str
    node: str | None
    candidates: tuple[Candidate, ...]
    reason: str
    awaits: tuple[str, ...] = ()  #: coordinators that could serve it, but not now; nobody else can
    ask: AskFeatures | None = None  #: what the policy read of the request
    rows: tuple[Features, ...] = ()  #: and of each candidate that has a cost

    @property
    def chosen(self) -> Candidate | None:
        """The winning candidate."""
        return next((c for c in self.candidates if c.node == self.node), None)

    @property
    def expected_s(self) -> float:
        """The estimate of the whole request on the chosen node, seconds; 0 where the policy has none."""
        return self._sum("wait_s", "load_s", "prefill_s", "decode_s")

    @property
    def service_s(self) -> float:
        """Of it what the node works on this request alone: prefill and decode."""
        return self._sum("prefill_s", "decode_s")

    def _sum(self, *names: str) -> float:
        terms = self.chosen.terms if self.chosen else {}
        return sum(terms.get(name, 0.0) for name in names)

    def as_dict(self) -> dict[str, Any]:
        """For the journal, ``sollol explain`` and ``_sollol_routing``: JSON-ready."""
        return {
            "policy": self.policy,
            "node": self.node,
            "reason": self.reason,
            "candidates": [
                {"node": c.node, "excluded": c.excluded}
                if c.excluded
                else {
                    "node": c.node,
                    "cost": round(c.cost, 6),
                    "terms": {name: round(value, 6) for name, value in c.terms.items()},
                    "notes": list(c.notes),
                }
                for c in self.candidates
            ],
        }
