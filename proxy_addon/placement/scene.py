"""Everything that features are made from for one decision, and the shape that all policies have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.report import Model, Report, Resident, ShardModel
from proxy_addon.ask import Ask, ReloadKey
from proxy_addon.fleet.learning import Estimate, Machine, Speeds
from proxy_addon.fleet.node import Node
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.memory import ModelShape, Room
from proxy_addon.placement.runner import Start


@dataclass(slots=True)
class Place:
    """A node that has the asked model, and what of it stays the same from one request to the next.

    It is kept (view.py) as long as the objects that it was made from are still the node's.
    """

    name: str
    node: Node
    row: Model
    resident: Resident | None
    report: Report | None
    parallel: int
    stamp: int  #: of what was learned of it
    answers: bool  #: its polls
    coordinator: bool
    slots: int  #: requests that a runner of the model generates at a time
    machine: Machine
    estimate: Estimate
    s_per_prompt_token: float
    s_per_output_token: float
    absent_load_s: float  #: 0 where the model is resident, under whatever options
    lost_s: float  #: that a failed attempt costs, besides its work
    other_version: bool = False  #: than the one that the fleet serves
    starts: Starts | None = None
    success_rate: float = 1.0
    success_s: float = -1.0  #: the second of which that is
    slowdowns: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    @property
    def room(self) -> Room | None:
        """Its memory; None without an agent."""
        return self.machine.room

    @property
    def sharded(self) -> ShardModel | None:
        """What the node expects of the model, where it is a coordinator."""
        return self.estimate.prior

    def success_rate_at(self, second_s: float, speeds: Speeds) -> float:
        """Share of the node's requests that succeed, as of the whole second."""
        if self.success_s != second_s:
            self.success_rate, self.success_s = speeds.success_rate(self.name, second_s), second_s
        return self.success_rate

    def slowdown(self, beside: int, runners: int, speeds: Speeds) -> tuple[float, float]:
        """How many times longer a token takes than alone, and by what share others take longer for us.

        That is with ``beside`` other sequences of the model and ``runners`` other models at work. Where the
        model is at work already, we are one more of its sequences; else it is one more runner.
        """
        found = self.slowdowns.get((beside, runners))
        if found is None:
            slow = speeds.slowdown(self.name, beside, runners)
            before = speeds.slowdown(self.name, beside - 1, runners) if beside else 1.0
            if runners and not beside:
                before = speeds.slowdown(self.name, 0, runners - 1)
            found = self.slowdowns[beside, runners] = slow, slow / before - 1
        return found


@dataclass(slots=True)
class Starts:
    """How a place would get to serve a request, what that was worked out from, and what follows from it."""

    wanted: tuple[object, ...]  #: see :class:`Scene`
    sent: ReloadKey | None  #: what the runner was loaded for
    start: Start | str
    room: tuple[object, ...] | None = None  #: what else decides; None where a runner need not be loaded
    priced_s: float | None = None  #: the second in which ``evict_s`` was worked out
    evict_s: float = 0.0
    row: Features | None = None  #: the last features, where nothing in them runs down with time
    row_s: float = -1.0  #: the second of which they are


@dataclass(slots=True)
class Scene:
    """One decision's view of the world."""

    ask: Ask
    features: AskFeatures
    speeds: Speeds
    now_s: float
    second_s: float  #: the whole second: what fades over minutes is read once in it
    slots: int | None  #: that every runner has for such a request; None: as many as it has
    shape: ModelShape | None
    seen: Mapping[int, float]
    wanted: tuple[object, ...]  #: of the request, what decides which runner can serve it
    in_doubt: bool = False  #: nobody is known to hold the model; see diversion.py
    outside: bool = False  #: the places looked at are not those that are set to do this kind

    def cached_tokens(self, node: Node) -> float:
        """Tokens of the prompt that are expected in the prefix cache of ``node``, as the model counts."""
        ask = self.ask
        cached = node.prefixes.cached_tokens(ask.key, ask.prefix)
        return cached * self.features.prompt_tokens / max(ask.prompt_tokens, 1) if cached else 0.0


class Policy(Protocol):
    """How nodes are compared: pure functions of what is known of the request and of a node."""

    def cost(self, ask: AskFeatures, row: Features) -> float:
        """What is minimised: seconds, or minus the score, …"""

    def terms(self, ask: AskFeatures, row: Features) -> dict[str, float]:
        """What the cost is made of."""

    def explain(self, ask: AskFeatures, row: Features) -> str:
        """Why the node was chosen, in a few words."""

    def bounds(self, scene: Scene, places: Sequence[Place]) -> list[float]:
        """For each of ``places`` a value that its cost is never below, quickly."""
