"""A placement as a value: the node, every candidate with every term, and the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from proxy_addon.placement.features import AskFeatures, Features

if TYPE_CHECKING:
    from proxy_addon.placement.scene import Policy


@dataclass(slots=True)  # not frozen: that makes ten of them for each request three times as slow to build
class Candidate:
    """One node as the policy saw it. ``excluded`` says why it may not serve; then it has no cost."""

    node: str
    excluded: str | None = None
    cost: float = float("inf")  #: what the policy minimises: seconds, or minus the score, …
    terms: dict[str, float] = field(default_factory=dict)  #: what ``cost`` is made of; see the policy
    notes: tuple[str, ...] = ()  #: "resident", "reload: num_ctx 4096 → 8192", "CPU offload 40 %", …


class Decision:
    """Where one attempt of a request goes and why. ``node`` is None where nobody may serve it.

    Candidates and reason are worked out when they are read: most of it is for people, who come later.
    """

    __slots__ = (
        "_candidates",
        "_chosen",
        "ask",
        "awaits",
        "costs",
        "how",
        "left",
        "node",
        "out",
        "policy",
        "remark",
        "row",
        "rows",
    )

    def __init__(
        self,
        policy: str,
        node: str | None,
        candidates: Sequence[Candidate] = (),
        reason: str = "",
        awaits: tuple[str, ...] = (),
        ask: AskFeatures | None = None,
        rows: Sequence[Features] = (),
    ) -> None:
        self.policy = policy
        self.node = node
        self.awaits = awaits  #: coordinators that could serve it, but not now; nobody else can
        self.ask = ask  #: what the policy read of the request
        self.rows = rows  #: and of each candidate that has a cost
        self.left = 0  #: nodes that might serve it as well, but could not win and were not worked out
        #: what was known of the chosen node
        self.row = next((row for row in rows if row.node == node), None) if rows else None
        #: by which candidates and reason are worked out from the rows and what follows; None: they were given
        self.how: Policy | None = None
        self.out: Sequence[tuple[str, str]] = ()  #: who may not serve, and why
        self.costs: Sequence[float] = ()  #: of the rows
        self.remark = reason  #: the reason, or what is added to it
        self._candidates: tuple[Candidate, ...] | None = tuple(candidates)
        self._chosen = next((c for c in candidates if c.node == node), None) if candidates else None

    @classmethod
    def by(
        cls,
        policy: str,
        how: Policy,
        ask: AskFeatures,
        rows: Sequence[Features],
        costs: Sequence[float],
        chosen: int | None,
        out: Sequence[tuple[str, str]] = (),
        remark: str = "",
        awaits: tuple[str, ...] = (),
        left: int = 0,
    ) -> Decision:
        """``how``'s choice among ``rows`` at ``costs``, that at ``chosen``; ``out`` are the others, and why.

        ``remark`` is added to the reason; it is all of it where nobody is chosen.
        """
        made = cls.__new__(cls)
        made.policy, made.how, made.ask, made.rows, made.costs = policy, how, ask, rows, costs
        made.out, made.remark, made.awaits, made.left = out, remark, awaits, left
        made.node = made.row = made._chosen = made._candidates = None
        if chosen is not None:
            made.row = row = rows[chosen]
            made.node = row.node
            made._chosen = Candidate(row.node, None, costs[chosen], how.terms(ask, row), row.notes)
        return made

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every node that was looked at."""
        if self._candidates is None:
            out = [Candidate(node, excluded=why) for node, why in self.out]
            self._candidates = (*out, *map(self._candidate, self.rows, self.costs))
        return self._candidates

    @property
    def chosen(self) -> Candidate | None:
        """The winning candidate."""
        return self._chosen

    @property
    def reason(self) -> str:
        """Why the node was chosen, or why none was."""
        if self.how is None or self.ask is None or (row := self.row) is None:
            return self.remark
        return reason(self.how, self.ask, row, self.remark)

    @property
    def wait_s(self) -> float:
        """Seconds until the chosen node has a slot free, or can begin to load the model."""
        row = self.row
        if row is not None:
            return row.wait_s
        return self._chosen.terms.get("wait_s", 0.0) if self._chosen is not None else 0.0

    @property
    def expected_s(self) -> float:
        """The estimate of the whole request on the chosen node, seconds; 0 where the policy has none."""
        if self._chosen is None:
            return 0.0
        get = self._chosen.terms.get
        return get("wait_s", 0.0) + get("load_s", 0.0) + get("prefill_s", 0.0) + get("decode_s", 0.0)

    @property
    def service_s(self) -> float:
        """Of it what the node works on this request alone: prefill and decode."""
        if self._chosen is None:
            return 0.0
        get = self._chosen.terms.get
        return get("prefill_s", 0.0) + get("decode_s", 0.0)

    @property
    def evicts(self) -> tuple[str, ...]:
        """Models that must go there for it."""
        return self.row.evicts if self.row is not None else ()

    @property
    def need_bytes(self) -> int:
        """Memory that a load of the model takes there; 0 where it need not be loaded, or nobody knows."""
        return self.row.need_bytes if self.row is not None else 0

    def _candidate(self, row: Features, cost: float) -> Candidate:
        if row is self.row and self._chosen is not None:
            return self._chosen
        assert self.how is not None and self.ask is not None
        return Candidate(row.node, None, cost, self.how.terms(self.ask, row), row.notes)


def reason(how: Policy, ask: AskFeatures, row: Features, remark: str) -> str:
    """Why ``how`` chose ``row``, in words."""
    return f"{row.node} {how.explain(ask, row)}{remark}"
