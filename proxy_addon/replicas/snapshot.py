"""The fleet as ``plan.py`` and ``pins.py`` see it: plain numbers, read from nodes, flights and speeds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from heapq import nlargest
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
from proxy_addon.replicas.plan import Place, Runner, Wanted

GENERATE = "/api/generate"
MANY_EXCLUDED = 6  #: a sentence names so many nodes
MOST_PLACES = 32  #: as many as a decision works out in full
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
    return busiest.loaded_with[key] if busiest is not None else fleet.usual(key)


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
    followed: Collection[str],
    now_s: float,
) -> dict[str, Wanted]:
    """Every model that somebody asks for now, and those ``followed`` all the same; places apart.

    By canonical name; only such that are in some node's memory, or on their way there. ``service_s`` says how
    long a request of a model keeps a slot; ``waiting`` has the model of each request in the proxy's own line,
    and how long it has waited.
    """
    in_line: dict[str, list[float]] = {}
    for key, waited_s in waiting:
        in_line.setdefault(key, []).append(waited_s)
    nodes = [node for node in fleet.up(now_s) if not node.coordinator]
    asked = {*followed, *in_line, *(key for node in nodes for key in node.in_use)} - rules.models
    found = {}
    for key in asked:
        at = [n for n in nodes if (key in n.resident or key in n.in_use) and key in n.models]
        if at:
            found[key] = _asked(key, at, speeds, service_s, in_line.get(key, ()), now_s)
    return found


def resting(key: str, fleet: Fleet, speeds: Speeds, now_s: float) -> Wanted:
    """A model that nobody asks for at this moment: its demand, and who has it in memory."""
    runners = tuple(Runner(node.name) for node in fleet.up(now_s) if key in node.resident)
    return Wanted(speeds.demand.rate_per_s(key, None, now_s), 0.0, 0.0, runners)


def _asked(
    key: str,
    nodes: Collection[Node],
    speeds: Speeds,
    service_s: Mapping[str, float],
    line_s: Collection[float],
    now_s: float,
) -> Wanted:
    """A model that is asked for: how long requests wait on the nodes that have it, and in the line."""
    ask = load_ask(key)
    runners = tuple(_runner(node, ask, now_s) for node in nodes)
    each_s = service_s.get(key) or _expected_service_s(nodes, key)
    wait_s = min(runner.wait_s(each_s) for runner in runners)
    if line_s:
        wait_s = max(wait_s + len(line_s) * each_s / sum(runner.slots for runner in runners), *line_s)
    return Wanted(speeds.demand.rate_per_s(key, None, now_s), each_s, wait_s, runners)


def places(
    key: str,
    model: Wanted,
    fleet: Fleet,
    speeds: Speeds,
    rules: Rules,
    busy: Collection[str],
    now_s: float,
) -> tuple[Place, ...]:
    """The nodes that could load ``key`` besides those that have it, and those ``busy`` with a change.

    Of a large fleet the :data:`MOST_PLACES` that promise most.
    """
    ask = load_ask(key, options_in_use(fleet, key))
    out = {*busy, *(runner.node for runner in model.runners)}
    speed = {node: _estimate(node, key, speeds) for node in fleet.holders(key, now_s) if not node.coordinator}
    present_tok_s = max((each.decode_tok_s for node, each in speed.items() if node.name in out), default=None)
    able = (node for node in speed if node.name not in out and unable(node, key, now_s) is None)
    best = nlargest(MOST_PLACES, able, lambda node: speed[node].decode_tok_s / (1 + len(node.flights)))
    found = []
    for node in best:
        begin = _start(node, ask, fleet, speeds)
        if isinstance(begin, str) or begin.gpu_share < rules.min_gpu_share:
            continue
        slower = present_tok_s / speed[node].decode_tok_s if present_tok_s else 1.0
        if begin.gpu_share < 1:
            slower *= hardware.offload_slowdown(begin.gpu_share, speed[node].hardware.cpu_slowdown)
        each_s, load_s = model.service_s * slower, speed[node].load_s
        found.append(Place(node.name, each_s, load_s, begin.evicts, len(node.flights)))
    return tuple(found)


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
    ask = load_ask(key, fleet.usual(key))
    for node in fleet.holders(key, now_s):
        begin = _start(node, ask, fleet, speeds) if node.pinned and not node.coordinator else ""
        if isinstance(begin, Start) and (ousted := node.pinned.intersection(begin.evicts)):
            pinned = ", ".join(map(names.display, sorted(ousted)))
            excluded.setdefault(node.name, f"would give up {pinned}, which is pinned there")
    decision = decide(ask, fleet, speeds, now_s, excluded=excluded, rules=rules)
    if decision.node is not None:
        return Stand(decision.node)
    if fleet.nobody_stores(key):
        return Stand(None, "no node has it")
    having = {pin.node} if pin.node is not None else {node.name for node in fleet if key in node.models}
    why = [f"{c.node} {c.excluded}" for c in decision.candidates if c.excluded and c.node in having]
    return Stand(None, "; ".join(why[:MANY_EXCLUDED]) or decision.reason)


def _stays_s(node: Node, key: str) -> float | None:
    """Seconds until the model expires on ``node``; None where it is not in memory."""
    row = node.resident.get(key)
    if row is None:
        return None
    return (row.expires_at - datetime.now(UTC)).total_seconds() if row.expires_at else math.inf


def _runner(node: Node, ask: Ask, now_s: float) -> Runner:
    key, row = ask.key, node.models[ask.key]
    if key not in node.in_use:
        return Runner(node.name, slots_of(node, ask, row))
    flights = sorted((f for f in node.flights if f.ask.key == key), key=lambda flight: flight.started_s)
    slots = slots_of(node, flights[0].ask if flights else ask, row)
    waited_s = now_s - flights[slots].started_s if len(flights) > slots else 0.0
    return Runner(node.name, slots, len(flights), waited_s)


def _expected_service_s(nodes: Collection[Node], key: str) -> float:
    """What the decisions expect of the requests in flight, where nothing was measured yet."""
    expected = [flight.service_s or 0.0 for node in nodes for flight in node.flights if flight.ask.key == key]
    return sum(expected) / len(expected) if expected else 0.0


def _estimate(node: Node, key: str, speeds: Speeds) -> Estimate:
    machine = speeds.machine(node.name, node.report)
    return speeds.estimate(node.name, machine, key, node.models[key].size)


def _start(node: Node, ask: Ask, fleet: Fleet, speeds: Speeds) -> Start | str:
    """How ``node`` would get to serve ``ask``, or why it cannot."""
    row, room = node.models[ask.key], speeds.machine(node.name, node.report).room
    info = fleet.shapes.get(row.digest)
    shape = shape_of(info, row.size) if info else None
    return start(node, ask, row, room, slots_of(node, ask, row), shape, speeds.sizes(ask.key))
