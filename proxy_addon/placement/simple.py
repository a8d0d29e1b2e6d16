"""The policies ``least_loaded`` and ``round_robin``: what other balancers do, to compare with."""

from __future__ import annotations

from proxy_addon.placement.decision import Candidate
from proxy_addon.placement.runner import Start
from proxy_addon.placement.scene import Place, Scene


class LeastLoaded:
    """Minimises the requests in flight per slot."""

    def bounds(self, scene: Scene) -> list[float]:
        """The costs themselves."""
        return [len(place.node.flights) / place.node.parallel for place in scene.places]

    def judge(self, scene: Scene, place: Place, start: Start) -> Candidate:
        """Requests in flight per slot."""
        count = len(place.node.flights)
        return Candidate(
            place.name, None, count / place.node.parallel, {"in_flight": float(count)}, start.notes
        )

    def explain(self, chosen: Candidate) -> str:
        """The load."""
        return f"has the least load, {chosen.terms['in_flight']:.0f} in flight"


class RoundRobin:
    """Takes the node whose last request was placed longest ago."""

    def bounds(self, scene: Scene) -> list[float]:
        """The costs themselves."""
        return [float(place.node.turn) for place in scene.places]

    def judge(self, scene: Scene, place: Place, start: Start) -> Candidate:
        """The number of its last turn; turns are counted over all nodes."""
        return Candidate(
            place.name, None, float(place.node.turn), {"last_turn": float(place.node.turn)}, start.notes
        )

    def explain(self, chosen: Candidate) -> str:
        """Whose turn it is."""
        return "waited longest for its turn"
