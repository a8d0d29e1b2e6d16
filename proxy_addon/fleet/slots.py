"""How many requests a node serves at a time, which Ollama does not report (OLLAMA_NUM_PARALLEL).

An agent sees it on the command lines of the runners. Where there is none, it is found out: two answers of
one model that stream at the same time are served at the same time. To see that, a node must be sent more than
it is believed to serve: one request too many, when all believed slots are in use and others wait anyway, and
more and more rarely where it only waited. What the configuration says is not put to trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy_addon.endpoints import Task

if TYPE_CHECKING:
    from proxy_addon.fleet.node import Flight, Node

MOST = 16  #: more are not looked for
OVERLAP_S = 0.05  #: a last piece and the first one of the next answer can change places on their way
FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 600.0


@dataclass(slots=True)
class Trials:
    """When a node may next be sent one request more than it is believed to serve."""

    next_s: float = 0.0
    pause_s: float = FIRST_PAUSE_S


def to_offer(node: Node, now_s: float) -> int:
    """How many slots of a runner on ``node`` may be filled now, where others wait for one.

    That is what it is believed to have, and one more while a trial is due and none is under way.
    """
    parallel = node.parallel
    if node.parallel_known or parallel >= MOST or now_s < node.trials.next_s or node.coordinator:
        return parallel
    return parallel if any(count > parallel for count in node.in_use.values()) else parallel + 1


def taken(node: Node, flight: Flight, now_s: float) -> None:
    """``flight`` was just sent: if it is one more than can be served as far as is known, it is a trial."""
    if node.in_use[flight.ask.key] > node.parallel and now_s >= node.trials.next_s:
        node.trials.next_s = now_s + node.trials.pause_s
        node.trials.pause_s = min(2 * node.trials.pause_s, LONGEST_PAUSE_S)


def ended(flight: Flight, now_s: float) -> None:
    """``flight`` is about to be taken off its node: learn from those that are answered beside it."""
    node = flight.node
    if node.parallel_known or not _streams(flight, now_s):
        return
    key = flight.ask.key
    together = sum(1 for other in node.flights if other.ask.key == key and _streams(other, now_s))
    if together > node.parallel:
        node.parallel = min(together, MOST)
        node.trials = Trials(next_s=now_s)


def reported(node: Node, num_parallel: int | None) -> None:
    """The agent of ``node`` has seen a runner with ``num_parallel`` slots; others may have one only."""
    if not node.parallel_known and num_parallel is not None:
        node.parallel = max(node.parallel, min(num_parallel, MOST))


def restarted(node: Node) -> None:
    """``node`` was away: it may have come back with other settings."""
    if not node.parallel_known:
        node.parallel = 1
        node.trials = Trials()


def _streams(flight: Flight, now_s: float) -> bool:
    """Whether the answer has been coming for a while."""
    began_s = flight.first_byte_s
    generates = flight.ask.stream and flight.ask.task is Task.GENERATE
    return generates and began_s is not None and now_s - began_s >= OVERLAP_S
