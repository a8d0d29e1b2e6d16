"""How long what a node is doing will still take."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proxy_addon.endpoints import Task
from proxy_addon.fleet.node import Flight
from proxy_addon.placement.scene import Scene

OVERRUN = 0.25  #: what has taken longer than expected takes this share of its age longer still


def free_s(flights: Iterable[Flight], key: str, slots: int, left_s: Callable[[Flight], float]) -> list[float]:
    """When each slot of the runner of ``key`` is free, seconds from now, after all requests before us."""
    ahead = [flight for flight in flights if flight.ask.key == key]
    ends = [0.0] * slots
    if len(ahead) > 1 and slots > 1:
        ahead.sort(key=lambda flight: flight.started_s)
    for flight in ahead:
        first = ends.index(min(ends)) if slots > 1 else 0
        ends[first] += left_s(flight)
    return ends


def left_s(flight: Flight, scene: Scene, token_s: float) -> float:
    """How long ``flight`` will still occupy a slot where a token takes ``token_s``.

    Once it streams, that is what answers have left that got as far: of lengths as they are, the longer one
    has run, the longer it will.
    """
    if flight.first_byte_s is None or not flight.ask.stream or flight.ask.task is Task.EMBED:
        return remaining_s(flight, scene.now_s)
    done_tokens = max(scene.now_s - flight.first_byte_s, 0.0) / token_s
    return scene.speeds.output(flight.ask).remaining(done_tokens) * token_s


def remaining_s(flight: Flight, now_s: float) -> float:
    """How long ``flight`` will still occupy a slot."""
    service_s = flight.service_s if flight.service_s is not None else flight.expected_s
    age_s = now_s - flight.started_s
    left_s = flight.expected_s - age_s
    worked_s = age_s - (flight.expected_s - service_s)
    return min(max(left_s, OVERRUN * worked_s), max(service_s, OVERRUN * worked_s))


def load_left_s(flight: Flight, now_s: float) -> float:
    """How long the load that ``flight`` waits for will still take."""
    service_s = flight.service_s if flight.service_s is not None else 0.0
    age_s = now_s - flight.started_s
    return max(flight.expected_s - service_s - age_s, OVERRUN * age_s)
