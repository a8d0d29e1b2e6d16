"""From a node to its features: what of it matters to one request, in numbers.

What does not change from request to request is kept with the place (scene.py) beside all that it was worked
out from, so that it holds exactly as long as that does.
"""

from __future__ import annotations

from proxy_addon.ask import Ask
from proxy_addon.fleet import hardware
from proxy_addon.fleet.node import Node
from proxy_addon.fleet.patience import overrun
from proxy_addon.placement.features import Features
from proxy_addon.placement.runner import Start, loading, start
from proxy_addon.placement.scene import Place, Scene, Starts
from proxy_addon.placement.waits import drained_s, free_s, left, load_left_s

KEPT_S = 300.0  #: Ollama's default keep_alive: so long a model would stay if it were not evicted
#: What a second of loading again counts. It is not one request alone that waits for it, but all that come for
#: the model or the node meanwhile, and it may drive out another model in turn. Of 1, 1.5, 2, 3, 4 and 6 this
#: served the simulated traces best (``python -m tests.sim``); more leaves nodes idle beside a long line.
LOADED_AGAIN = 3.0
UNKNOWN_IS_WANTED = 0.5  #: probability that a model is wanted again that nobody has asked this proxy for


def features(scene: Scene, place: Place) -> Features | str:
    """What a policy reads of the node at ``place``, or the reason why it cannot serve the request."""
    node, ask, second_s = place.node, scene.ask, scene.second_s
    starts = _starts(scene, place)
    begin = starts.start
    if isinstance(begin, str):
        return begin
    flights = node.flights
    cached = (
        scene.cached_tokens(node) if ask.prefix and not begin.loads else 0.0
    )  # a new runner holds nothing
    row = starts.row
    if (
        row is not None
        and starts.row_s == second_s
        and row.turn == node.turn  # it grows with each request that comes, and
        and row.in_flight == len(flights)  # between two of them requests only go
        and row.cached_tokens == cached
        and row.outside is scene.outside
        and row.poll_latency_s == node.poll_latency_s
        and row.priority == node.priority
        and not node.preferred_tasks
    ):
        return row
    offload, estimate = 1.0, place.estimate
    if begin.gpu_share < 1:
        offload = hardware.offload_slowdown(begin.gpu_share, estimate.hardware.cpu_slowdown)
    wait_s, load_s = 0.0, estimate.load_s if begin.loads else 0.0
    waits = bool(node.loads)
    beside, runners, slow, added, work_s, late = 0, 0, 1.0, 0.0, 0.0, 1.0
    notes = begin.notes
    if flights:
        late = overrun(node, scene.speeds, scene.now_s)
        if late > 1:
            waits = True
            notes = (*notes, f"late: takes {late:.1f} times as long as expected")
        slots = scene.slots or place.slots
        mine = node.in_use.get(ask.key, 0)
        beside = mine if mine < slots else slots - 1
        runners = len(node.in_use) - (mine > 0)
        if beside or runners:
            slow, added = place.slowdown(beside, runners, scene.speeds)
            work_s = node.work_s
        if mine >= slots or (mine and begin.loads):
            token_s = place.s_per_output_token * offload * slow
            ends = free_s(flights, ask.key, slots, left(scene, token_s))
            waits = True
            wait_s = max(ends) if begin.loads and begin.loading is None else min(ends)
        if begin.loading is not None:
            load_s = load_left_s(begin.loading, scene.now_s)
            if begin.loading.kept_s:  # it has not begun: who shares it waits as well until it may
                wait_s = max(wait_s, begin.loading.kept_s)
                load_s = max(load_s - begin.loading.kept_s, 0.0)
        elif begin.loads and (waits or not node.in_use.keys().isdisjoint(begin.drains)):
            waits = True
            wait_s = max(wait_s, _load_wait_s(scene, place, begin))
    evict_s = 0.0
    if begin.evicts or begin.replaces:
        if starts.priced_s != second_s:
            starts.priced_s, starts.evict_s = second_s, _evict_s(scene, place, begin)
        evict_s = starts.evict_s
    row = Features(
        place.name,
        wait_s,
        load_s,
        place.s_per_prompt_token * late,
        place.s_per_output_token * late,
        offload,
        begin.gpu_share,
        beside,
        runners,
        slow,
        added,
        work_s,
        cached,
        evict_s,
        place.success_rate_at(second_s, scene.speeds),
        place.lost_s,
        len(flights),
        node.parallel,
        node.turn,
        node.poll_latency_s,
        place.machine.cpu_utilisation,
        place.machine.gpu_free_bytes,
        node.priority,
        bool(node.preferred_tasks) and prefers(node, ask),
        scene.outside,
        begin.evicts,
        begin.need_bytes,
        notes,
    )
    if not waits and starts is place.starts:
        starts.row, starts.row_s = row, second_s
    return row


def prefers(node: Node, ask: Ask) -> bool:
    """Whether the settings of ``node`` name the task of ``ask``."""
    return ask.kind in node.preferred_tasks or str(ask.task) in node.preferred_tasks


def _starts(scene: Scene, place: Place) -> Starts:
    """How the node would get to serve the request, from memory where nothing that matters has changed."""
    node, key = place.node, scene.ask.key
    if node.flights:
        resident = node.resident
        if any(f.load and (f.first_byte_s is None or f.ask.key not in resident) for f in node.flights):
            return Starts((), None, _start(scene, place))  # a load under way changes all the time
        if place.resident is None and key in node.in_use:
            return Starts((), None, _start(scene, place))  # it was loaded since the last poll
    known, sent = place.starts, node.loaded_with.get(key)
    if known is not None and known.sent == sent and known.wanted == scene.wanted:
        room = known.room
        if room is None or (
            room[0] is scene.shape
            and room[1] is scene.seen
            and room[2] == node.resident
            and room[3] == node.in_use.keys()
            and room[4] is node.sessions
            and room[5] is node.models
        ):
            return known
    begin = _start(scene, place)
    needs_room = isinstance(begin, str) or begin.loads
    given = scene.shape, scene.seen, dict(node.resident), set(node.in_use), node.sessions, node.models
    place.starts = Starts(scene.wanted, sent, begin, given if needs_room else None)
    return place.starts


def _start(scene: Scene, place: Place) -> Start | str:
    slots = scene.slots or place.slots
    return start(
        place.node,
        scene.ask,
        place.row,
        place.room,
        slots,
        scene.shape,
        scene.seen,
        place.sharded,
        scene.in_doubt,
    )


def _load_wait_s(scene: Scene, place: Place, begin: Start) -> float:
    """Loads before ours, and the requests of those models that must make room; both at the same time."""
    node, now_s = place.node, scene.now_s
    wait_s = drained_s(node, begin.drains, now_s)
    if node.loads:
        waits = [load_left_s(flight, now_s) for flight in loading(node, place.room)]
        wait_s = max(wait_s, *waits) if waits else wait_s
    return wait_s


def _evict_s(scene: Scene, place: Place, begin: Start) -> float:
    """What loading again costs, of all that must go, times the probability that it is wanted before long.

    A runner that makes room for one of the same model with other options is priced like any: so each of two
    contexts in demand finds a node of its own instead of taking turns on one.
    """
    node, load_bytes_s = place.node, place.estimate.load_bytes_s
    again_s = {name: _file_bytes(node, name) / load_bytes_s for name in begin.evicts}
    if begin.replaces:
        again_s[scene.ask.key] = place.estimate.load_s
    return LOADED_AGAIN * sum(seconds * _wanted_again(scene, node, name) for name, seconds in again_s.items())


def _file_bytes(node: Node, name: str) -> int:
    """What must be read to load the model ``name`` on ``node`` again: its cache is not on the disk."""
    row = node.models.get(name) or node.resident.get(name)
    return row.size if row is not None else 0


def _wanted_again(scene: Scene, node: Node, name: str) -> float:
    """Probability that the model ``name`` would be used as it is loaded on ``node``, as long as it stays."""
    if name in node.pinned:
        return 1.0
    demand, loaded_with = scene.speeds.demand, node.loaded_with.get(name)
    unknown = loaded_with is None and name == scene.ask.key  # by whom, and for what, nobody knows
    if unknown or not demand.rate_per_s(name, None, scene.second_s):
        return UNKNOWN_IS_WANTED
    return demand.again_within(name, loaded_with, KEPT_S, scene.second_s)
