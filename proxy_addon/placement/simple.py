"""The policies ``least_loaded`` and ``round_robin``: what other balancers do, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.scene import Place, Scene


class LeastLoaded:
    """Minimises the requests in flight per slot."""

    def cost(self, ask: AskFeatures, row: Features) -> float:
        """Requests in flight per slot."""
        return row.in_flight / row.parallel

    def terms(self, ask: AskFeatures, row: Features) -> dict[str, float]:
        """Requests in flight."""
        return {"in_flight": float(row.in_flight)}

    def explain(self, ask: AskFeatures, row: Features) -> str:
        """The load."""
        return f"has the least load, {row.in_flight} in flight"

    def bounds(self, scene: Scene, places: Sequence[Place]) -> list[float]:
        """The costs themselves."""
        return [len(place.node.flights) / place.node.parallel for place in places]


class RoundRobin:
    """Takes the node whose last request was placed longest ago."""

    def cost(self, ask: AskFeatures, row: Features) -> float:
        """The number of its last turn; turns are counted over all nodes."""
        return float(row.turn)

    def terms(self, ask: AskFeatures, row: Features) -> dict[str, float]:
        """The number of its last turn."""
        return {"last_turn": float(row.turn)}

    def explain(self, ask: AskFeatures, row: Features) -> str:
        """Whose turn it is."""
        return "waited longest for its turn"

    def bounds(self, scene: Scene, places: Sequence[Place]) -> list[float]:
        """The costs themselves."""
        return [float(place.node.turn) for place in places]
