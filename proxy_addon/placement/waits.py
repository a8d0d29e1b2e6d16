"""How long what a node is doing will still take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heapreplace

from proxy_addon.endpoints import Task
from proxy_addon.fleet.node import Flight, Node
from proxy_addon.placement.scene import Scene

OVERRUN = 0.25  #: what has taken longer than expected takes this share of its age longer still


def free_s(flights: Iterable[Flight], key: str, slots: int, left_s: Callable[[Flight], float]) -> list[float]:
    """When each slot of the runner of ``key`` is free, seconds from now, after all requests before us."""
    ahead = [flight for flight in flights if flight.ask.key == key]
    if len(ahead) > 1 and slots > 1:
        ahead.sort(key=lambda flight: flight.started_s)
    ends = [left_s(flight) for flight in ahead[:slots]]
    ends += [0.0] * (slots - len(ends))
    heapify(ends)
    for flight in ahead[slots:]:
        heapreplace(ends, ends[0] + left_s(flight))
    return ends


def left(scene: Scene, token_s: float) -> Callable[[Flight], float]:
    """What tells how long a flight will still occupy a slot where a token takes ``token_s``.

    Once it streams, that is what answers have left that got as far: of lengths as they are, the longer one
    has run, the longer it will.
    """
    now_s, output = scene.now_s, scene.speeds.output

    def left_s(flight: Flight) -> float:
        if flight.first_byte_s is None or not flight.ask.stream or flight.ask.task is Task.EMBED:
            return remaining_s(flight, now_s)
        done_tokens = max(now_s - flight.first_byte_s, 0.0) / token_s
        return output(flight.ask).remaining(done_tokens) * token_s

    return left_s


def drained_s(node: Node, models: Iterable[str], now_s: float) -> float:
    """When the last request for any of ``models`` ends, seconds from now."""
    latest_s, in_use, slots = 0.0, node.in_use, max(node.parallel, 1)
    for model in models:
        count = in_use.get(model, 0)
        if count > slots:
            latest_s = max(latest_s, *free_s(node.flights, model, slots, lambda f: remaining_s(f, now_s)))
        elif count:
            for flight in node.flights:
                if flight.ask.key == model and (left_s := remaining_s(flight, now_s)) > latest_s:
                    latest_s = left_s
    return latest_s


def remaining_s(flight: Flight, now_s: float) -> float:
    """How long ``flight`` will still occupy a slot: what is left of its time, but no more than its work.

    What has taken longer than expected will take longer still (:data:`OVERRUN`).
    """
    expected_s, service_s = flight.expected_s, flight.service_s
    left_s = expected_s - (now_s - flight.started_s)
    if service_s is None:
        service_s = expected_s
    overrun_s = OVERRUN * (service_s - left_s)
    if left_s < overrun_s:
        left_s = overrun_s
    most_s = service_s if service_s > overrun_s else overrun_s
    return left_s if left_s < most_s else most_s


def load_left_s(flight: Flight, now_s: float) -> float:
    """How long the load that ``flight`` waits for will still take."""
    service_s = flight.service_s if flight.service_s is not None else 0.0
    age_s = now_s - flight.started_s
    return max(flight.expected_s - service_s - age_s, OVERRUN * age_s)
