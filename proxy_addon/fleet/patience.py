"""Work in flight that is late makes its node look slow before it has ended: it may take long to end.

Late is a first byte that takes three times as long as was expected, and an answer that has streamed for
half as long again as 99 of 100 would take. What is explained by something else, a load or another answer
before it in the node's own line, is not held against the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from proxy_addon.fleet import evidence

if TYPE_CHECKING:
    from proxy_addon.fleet.learning import Speeds
    from proxy_addon.fleet.node import Flight, Node

LATE = 3.0
SHORTEST_S = 1.0  #: shorter expectations count as so long: a busy network or event loop is no slow node
SURE = 0.99
TOO_LONG = 1.5  #: times longer than 99 of 100: tokens' times and lengths are known to a few tens of percent
MOST = 20.0  #: more than so many times slower than expected changes no decision any more


class Patience(NamedTuple):
    """How long the phases of one request are expected to take: the first one, and the second one at most."""

    first_byte_s: float
    answer_s: float


def overrun(node: Node, speeds: Speeds, now_s: float) -> float:
    """How many times longer than expected the work in flight on ``node`` takes already; 1 if in time."""
    flights = node.flights
    if not flights:
        return 1.0
    worst, streams = 1.0, False
    for flight in flights:
        if flight.first_byte_s is not None and flight.ask.stream:
            streams = True
            longer = (now_s - flight.first_byte_s) / max(_of(flight, speeds).answer_s, SHORTEST_S)
            worst = max(worst, longer if longer >= TOO_LONG else 1.0)
    if not streams:
        oldest = min(flights, key=lambda flight: flight.started_s)
        worst = _silent(oldest, speeds, now_s)
    return min(worst, MOST)


def _silent(flight: Flight, speeds: Speeds, now_s: float) -> float:
    if flight.load:
        return 1.0
    first_byte_s, answer_s = _of(flight, speeds)
    expected_s = max(first_byte_s, SHORTEST_S)
    age_s = now_s - flight.started_s
    if age_s < LATE * expected_s + (0.0 if flight.ask.stream else answer_s):
        return 1.0
    return max(age_s / (expected_s if flight.ask.stream else expected_s + answer_s), 1.0)


def _of(flight: Flight, speeds: Speeds) -> Patience:
    """What was expected when it was first asked for: what is learned meanwhile must not excuse it."""
    if flight.patience is None:
        node, ask = flight.node, flight.ask
        row = node.models.get(ask.key)
        if row is None:
            return Patience(flight.expected_s, flight.expected_s)
        machine = speeds.machine(node.name, node.report)
        estimate = speeds.estimate(node.name, machine, ask.key, row.size)
        slowed = evidence.offload(node, ask.key, machine.hardware)
        before_s = flight.expected_s - (flight.service_s if flight.service_s is not None else 0.0)
        prefill_s = 0.0 if ask.load_only else speeds.prompt_tokens(ask) / estimate.prefill_tok_s * slowed
        token_s = speeds.slowdown(node.name, node.parallel - 1) * slowed / estimate.decode_tok_s
        flight.patience = Patience(before_s + prefill_s, speeds.output(ask).quantile(SURE) * token_s)
    return flight.patience
