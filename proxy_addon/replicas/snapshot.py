"""The fleet as ``plan.py`` and ``pins.py`` see it: plain numbers, read from nodes, flights and speeds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from agent.ollama import names
from proxy_addon.admission.admission import Admission
from proxy_addon.ask import Ask, ReloadKey
from proxy_addon.endpoints import match
from proxy_addon.fleet import hardware
from proxy_addon.fleet.learning import Estimate, Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.memory import shape_of
from proxy_addon.placement.policies import decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.runner import Start, slots_of, start
from proxy_addon.placement.view import unable
from proxy_addon.replicas.pins import Past, Pin, Stand
from proxy_addon.replicas.plan import Place, Runner, Wanted, expected_wait_s

GENERATE = "/api/generate"
ELSEWHERE = "is not the node that it is pinned to"


def load_ask(key: str, reload_key: ReloadKey = ()) -> Ask:
    """A request that only loads the model ``key``, under the options ``reload_key``."""
    endpoint = match(GENERATE)
    assert endpoint is not None
    num_ctx = dict(reload_key).get("num_ctx")
    return Ask(
        endpoint,
        key,
        key,
        num_ctx=int(num_ctx) if isinstance(num_ctx, int | float) else None,
        reload_key=reload_key,
        load_only=True,
    )


def options_in_use(fleet: Fleet, key: str) -> ReloadKey:
    """The options under which ``key`` is asked for most: a replica under others would be loaded anew."""
    nodes = [node for node in fleet if key in node.loaded_with and key in node.resident]
    busiest = max(nodes, key=lambda node: (node.in_use[key], node.turn), default=None)
    return busiest.loaded_with[key] if busiest is not None else ()


def options_there(node: Node, key: str) -> dict[str, Any]:
    """The options of the runner of ``key`` on ``node``: a request with these does not load it anew."""
    options, row = dict(node.loaded_with.get(key, ())), node.resident.get(key)
    if row is not None and row.context_length:
        options["num_ctx"] = row.context_length
    return options


def wanted(
    fleet: Fleet,
    speeds: Speeds,
    rules: Rules,
    service_s: Mapping[str, float],
    waiting: Iterable[tuple[str, float]],
    limit_s: float,
    now_s: float,
    busy: Collection[str] = (),
) -> dict[str, Wanted]:
    """Every model that is in some node's memory, or on its way there, by canonical name.

    ``service_s`` says how long a request of a model keeps a slot; ``waiting`` has the model of each request
    in the proxy's own line, and how long it has waited. Where a model could be loaded besides is worked out
    only if its pressure is above ``limit_s``; not on the nodes that are ``busy`` with a change.
    """
    at: dict[str, list[Node]] = {}
    in_line: dict[str, list[float]] = {}
    for key, waited_s in waiting:
        in_line.setdefault(key, []).append(waited_s)
    for node in fleet.up(now_s):
        if not node.coordinator:
            for key in {*node.resident, *(flight.ask.key for flight in node.flights)}:
                if key in node.models and key not in rules.models:
                    at.setdefault(key, []).append(node)
    found = {}
    for key, nodes in at.items():
        runners = tuple(_runner(node, key, now_s) for node in nodes)
        each_s = service_s.get(key) or _expected_service_s(nodes, key)
        wait_s = min(runner.wait_s(each_s) for runner in runners)
        if line := in_line.get(key):
            wait_s = max(wait_s + len(line) * each_s / sum(r.slots for r in runners), *line)
        model = Wanted(speeds.demand.rate_per_s(key, None, now_s), each_s, wait_s, runners)
        if max(wait_s, expected_wait_s(model)) > limit_s:
            there = {node.name for node in nodes}
            places = tuple(_places(key, fleet, speeds, rules, each_s, now_s, there, busy))
            model = Wanted(model.rate_per_s, each_s, wait_s, runners, places)
        found[key] = model
    return found


def in_line(admission: Admission) -> Iterator[tuple[str, float]]:
    """The model of each request that waits in the proxy's own line, and how long it has waited."""
    return ((standing.waiter.ask.key, standing.waited_s) for standing in admission.standings())


def stand(
    pin: Pin,
    past: Past,
    fleet: Fleet,
    speeds: Speeds,
    rules: Rules,
    acting: Collection[tuple[str, str]],
    now_s: float,
) -> Stand:
    """Where ``pin`` should be held, and how it stands there. ``acting`` are the changes under way."""
    key = pin.model
    if pin.node is not None and pin.node not in fleet.nodes:
        return Stand(None, f"no node {pin.node} is known")
    allowed = [node for node in fleet if pin.node in (None, node.name) and not node.leaving]
    for node in allowed:
        if (key, node.name) in acting:
            return Stand(node.name, loading=True, stays_s=_stays_s(node, key))
    # A node that is lost has nothing in memory; one that is only ejected keeps what it has.
    holding = {node: stays_s for node in allowed if (stays_s := _stays_s(node, key)) is not None}
    if holding:
        best = max(holding, key=lambda node: (node.name == past.node, holding[node]))
        also = frozenset(node.name for node in holding if node is not best and key not in node.pinned)
        return Stand(best.name, stays_s=holding[best], also=also)
    excluded = {name: ELSEWHERE for name in fleet.nodes if pin.node not in (None, name)}
    ask = load_ask(key)
    for node, _, begin in _starts(ask, fleet, speeds, now_s):
        if isinstance(begin, Start) and (ousted := node.pinned.intersection(begin.evicts)):
            pinned = ", ".join(map(names.display, sorted(ousted)))
            excluded.setdefault(node.name, f"would give up {pinned}, which is pinned there")
    decision = decide(ask, fleet, speeds, now_s, excluded=excluded, rules=rules)
    if decision.node is not None:
        return Stand(decision.node)
    if fleet.nobody_stores(key):
        return Stand(None, "no node has it")
    why = [f"{c.node} {c.excluded}" for c in decision.candidates if c.excluded not in (None, ELSEWHERE)]
    return Stand(None, "; ".join(why) or decision.reason)


def _stays_s(node: Node, key: str) -> float | None:
    """Seconds until the model expires on ``node``; None where it is not in memory."""
    row = node.resident.get(key)
    if row is None:
        return None
    return (row.expires_at - datetime.now(UTC)).total_seconds() if row.expires_at else math.inf


def _runner(node: Node, key: str, now_s: float) -> Runner:
    flights = sorted(
        (flight for flight in node.flights if flight.ask.key == key), key=lambda flight: flight.started_s
    )
    slots = slots_of(node, flights[0].ask if flights else load_ask(key), node.models[key])
    waited_s = now_s - flights[slots].started_s if len(flights) > slots else 0.0
    return Runner(node.name, slots, len(flights), waited_s)


def _expected_service_s(nodes: Collection[Node], key: str) -> float:
    """What the decisions expect of the requests in flight, where nothing was measured yet."""
    expected = [flight.service_s or 0.0 for node in nodes for flight in node.flights if flight.ask.key == key]
    return sum(expected) / len(expected) if expected else 0.0


def _places(
    key: str,
    fleet: Fleet,
    speeds: Speeds,
    rules: Rules,
    service_s: float,
    now_s: float,
    there: Collection[str],
    busy: Collection[str],
) -> Iterator[Place]:
    """The nodes that could load ``key`` besides those where it is ``there``."""
    ask = load_ask(key, options_in_use(fleet, key))
    found = list(_starts(ask, fleet, speeds, now_s))
    present_tok_s = [estimate.decode_tok_s for node, estimate, _ in found if node.name in there]
    for node, estimate, begin in found:
        if node.name in there or node.name in busy or isinstance(begin, str):
            continue
        if begin.gpu_share < rules.min_gpu_share:
            continue
        slower = max(present_tok_s) / estimate.decode_tok_s if present_tok_s else 1.0
        if begin.gpu_share < 1:
            slower *= hardware.offload_slowdown(begin.gpu_share, estimate.hardware.cpu_slowdown)
        yield Place(node.name, service_s * slower, estimate.load_s, begin.evicts, len(node.flights))


def _starts(
    ask: Ask, fleet: Fleet, speeds: Speeds, now_s: float
) -> Iterator[tuple[Node, Estimate, Start | str]]:
    """The nodes that may serve ``ask``, coordinators apart, how fast they are, and how each would start."""
    key, seen = ask.key, speeds.sizes(ask.key)
    for node in fleet.holders(key, now_s):
        if node.coordinator or unable(node, key, now_s) is not None:
            continue
        row, machine = node.models[key], speeds.machine(node.name, node.report)
        info = fleet.shapes.get(row.digest)
        shape = shape_of(info, row.size) if info else None
        begin = start(node, ask, row, machine.room, slots_of(node, ask, row), shape, seen)
        yield node, speeds.estimate(node.name, machine, key, row.size), begin
