"""Everything a policy may look at for one decision, and the shape that all policies have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.report import Model, ShardModel
from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Estimate, Speeds
from proxy_addon.fleet.node import Node
from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.memory import Room
from proxy_addon.placement.runner import Start


@dataclass(slots=True)
class Place:
    """A node that may be considered, its row of the asked model, and how fast it is with that."""

    name: str
    node: Node
    row: Model
    slots: int  #: requests that a runner of the model serves at a time
    room: Room | None  #: its memory; None without an agent
    estimate: Estimate
    s_per_prompt_token: float
    s_per_output_token: float
    absent_load_s: float  #: 0 where the model is resident, under whatever options
    sharded: ShardModel | None = None  #: what the node expects of the model, where it is a coordinator


@dataclass(slots=True)
class Scene:
    """One decision's view of the world."""

    ask: Ask
    speeds: Speeds
    now_s: float
    places: list[Place]
    prompt_tokens: float = 0.0  #: expected
    output_tokens: float = 0.0


class Policy(Protocol):
    """How nodes are compared."""

    def bounds(self, scene: Scene) -> list[float]:
        """For each place of ``scene`` a value that its cost is never below, quickly."""

    def judge(self, scene: Scene, place: Place, start: Start) -> Candidate:
        """``place``, which would serve the request as ``start`` says, with its cost."""

    def explain(self, chosen: Candidate) -> str:
        """Why ``chosen`` was, in a few words."""
