"""Whether a request that a node has not begun to answer had better be done elsewhere. Pure functions.

What it has waited so far is lost either way: only what is left here, from what is known now, counts against
all of it elsewhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.fleet.patience import overrun
from proxy_addon.fleet.prefix_cache import PrefixCache
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.features import Features
from proxy_addon.placement.finish_time import FinishTime
from proxy_addon.placement.policies import decide
from proxy_addon.placement.runner import loading
from proxy_addon.placement.waits import OVERRUN, load_left_s

CLEARLY = 0.5  #: of the time that is left here; estimates are known to a few tens of percent
GAIN_S = 2.0  #: less is not worth a node's work thrown away, nor what the estimates do not see of a move


def worth_moving(left_here_s: float, elsewhere_s: float) -> bool:
    """Whether a request is taken back from where it has ``left_here_s`` to go."""
    return elsewhere_s < CLEARLY * left_here_s and left_here_s - elsewhere_s >= GAIN_S


@dataclass(frozen=True, slots=True)
class Left:
    """How long an unanswered request still takes where it is, and the main reason for it."""

    seconds: float
    why: str


def left_here(flight: Flight, then: Features, fleet: Fleet, speeds: Speeds, now_s: float) -> Left | None:
    """What is left of ``flight``, of whose node ``then`` was known when it was sent there.

    None where that cannot be told: the node may not be sent anything now.
    """
    node, ask = flight.node, flight.ask
    if flight.load and flight in loading(node, speeds.machine(node.name, node.report).room):
        service_s = flight.service_s if flight.service_s is not None else 0.0
        return Left(load_left_s(flight, now_s) + service_s, f"is still loading {ask.model}")
    before = _without_later(flight)
    alone = Fleet(nodes={node.name: before}, shapes=fleet.shapes)
    decision = decide(ask, alone, speeds, now_s)
    row, asked = decision.row, decision.ask
    if row is None or asked is None:
        return None
    late = overrun(node, speeds, now_s)
    longer = max(late / overrun(before, speeds, now_s), 1.0)
    cached = min((flight.cached_tokens or 0) / max(ask.prompt_tokens, 1), 1.0) * asked.prompt_tokens
    row = replace(
        row,
        cached_tokens=cached,
        s_per_prompt_token=row.s_per_prompt_token * longer,
        s_per_output_token=row.s_per_output_token * longer,
    )
    terms = FinishTime().terms(asked, row)
    silent_s, decode_s = terms["load_s"] + terms["prefill_s"], terms["decode_s"]
    if not ask.stream:
        silent_s, decode_s = silent_s + decode_s, 0.0  # all of it is lost with a move
    done_s = 0.0 if terms["wait_s"] or terms["load_s"] else _worked_s(flight, now_s)
    left_s = terms["wait_s"] + max(silent_s - done_s, OVERRUN * done_s) + decode_s
    return Left(left_s, _why(row, then, ask.model, late))


def elsewhere_s(decision: Decision) -> float:
    """What ``decision`` costs, in seconds, those of others included."""
    row, asked = decision.row, decision.ask
    if row is None or asked is None:
        return float("inf")
    return FinishTime().cost(asked, row)


def _worked_s(flight: Flight, now_s: float) -> float:
    """How long its node has worked on ``flight`` alone, as far as its wait and its load were as expected."""
    before_s = flight.expected_s - (flight.service_s if flight.service_s is not None else flight.expected_s)
    return max(now_s - flight.started_s - before_s, 0.0)


def _without_later(flight: Flight) -> Node:
    """Its node as if neither ``flight`` nor any that came after it were there."""
    node, key = flight.node, flight.ask.key
    ahead = {other for other in node.flights if other.started_s < flight.started_s}
    in_use = Counter(other.ask.key for other in ahead)
    loaded_with = dict(node.loaded_with)
    if key not in in_use:
        loaded_with[key] = flight.ask.reload_key  # not what a later one may have it loaded for
    return replace(
        node,
        flights=ahead,
        in_use=in_use,
        work_s=sum(other.expected_s if other.service_s is None else other.service_s for other in ahead),
        loads=node.loads & {other.ask.key for other in ahead if other.load and other.first_byte_s is None},
        loaded_with=loaded_with,
        prefixes=PrefixCache(),  # the real one holds this very prompt by now
        on_freed=None,
    )


def _why(row: Features, then: Features, model: str, late: float) -> str:
    """What is behind the time that is left, the most telling first."""
    told = (
        (row.gpu_share < then.gpu_share, f"runs {1 - row.gpu_share:.0%} of {model} on its CPU"),
        (late > 1, f"takes {late:.1f} times as long as expected"),
        (row.load_s > 0, f"must load {model} first"),
        (row.wait_s > 0, "has others to serve first"),
    )
    return next((text for holds, text in told if holds), "is no longer the fastest")
