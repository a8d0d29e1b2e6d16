"""What a node must do before it can serve a request: nothing, wait for a load under way, load, or reload.

Follows Ollama's scheduler (``server/sched.go``, ``needsReload``): a runner serves a request only if the
options that shaped it are the same; loads are serial; a reload or eviction waits for the victim's requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.report import Model, Resident, ShardModel
from proxy_addon.ask import Ask, ReloadKey
from proxy_addon.endpoints import Task
from proxy_addon.fleet.node import Flight, Node
from proxy_addon.placement import memory
from proxy_addon.placement.memory import Fit, ModelShape, Room

#: Families whose runners have one slot whatever OLLAMA_NUM_PARALLEL says (``server/sched.go``).
ONE_SLOT = ("mllama", "qwen3vl", "qwen35", "qwen3next", "lfm2", "nemotron_h")
AS_FITS = -1  #: layers on the GPU: Ollama's default
DEFAULTS = frozenset(ctx for _, ctx in memory.DEFAULT_NUM_CTX)


@dataclass(slots=True)
class Start:
    """How a node would get to serve a request."""

    loads: bool = False
    loading: Flight | None = None  #: the load under way that this request would share
    replaces: bool = False  #: a runner of the same model under other options
    drains: tuple[str, ...] = ()  #: models whose requests must end before the load can begin
    evicts: tuple[str, ...] = ()
    gpu_share: float = 1.0
    notes: tuple[str, ...] = ()
    need_bytes: int = 0  #: of memory that its load takes; 0 where nobody knows


def start(
    node: Node,
    ask: Ask,
    row: Model,
    room: Room | None,
    slots: int,
    shape: ModelShape | None = None,
    seen: Mapping[int, float] = memory.NOTHING_SEEN,
    sharded: ShardModel | None = None,
    in_doubt: bool = False,
) -> Start | str:
    """How ``node`` would get to serve ``ask``, or the reason why it cannot.

    ``room`` is its memory, None without an agent; ``shape`` and what it was ``seen`` to take improve the
    estimate of need. ``sharded`` is what a coordinator expects of the model. ``in_doubt``: a model that would
    be too big only by a context that is assumed, since ``ask`` names none, is taken to fit.
    """
    resident = node.resident.get(ask.key)
    shared = _shared_load(node, ask, row, room) if node.flights else None
    if shared is not None:
        return Start(loads=True, loading=shared, notes=("shares a load under way",))
    change = _change(node, ask, row, room, resident)
    goes = resident is not None and bool(node.flights) and node.drives_out(ask.key)
    if resident is not None and change is None and not goes:
        share = min(resident.size_vram / resident.size, 1.0) if resident.size else 1.0
        if node.coordinator or (room is not None and not room.gpus):
            share = 1.0  # a machine without accelerators is measured as it is, a plan over several as a whole
        offload = (f"CPU offload {1 - share:.0%}",) if share < 1 else ()
        return Start(gpu_share=share, notes=("resident", *offload))
    if resident is None and change is None and ask.key in node.in_use:
        return Start(notes=("in use there",))  # loaded since the last poll
    found = _fit(node, ask, row, room, slots, shape, seen, sharded, in_doubt)
    if not found.fits:
        return found.note
    notes: tuple[str, ...] = (f"reload: {change}" if change else "load",)
    if goes:
        notes += ("makes room for a load under way",)
    if found.evicts:
        notes += (f"evicts {len(found.evicts)}",)
    if found.note:
        notes += (found.note,)
    drains = (ask.key, *found.evicts) if change or goes else found.evicts
    return Start(
        True, None, change is not None, drains, found.evicts, found.gpu_share, notes, found.need_bytes
    )


def _change(node: Node, ask: Ask, row: Model, room: Room | None, resident: Resident | None) -> str | None:
    """Why the runner that the node has by the time of ``ask`` must be loaded anew; None if it need not.

    That is the one that was sent for last, where a poll has not shown it yet.
    """
    sent = node.loaded_with.get(ask.key)
    unseen = ask.key in node.in_use and (
        resident is None or (bool(node.loads) and any(f.ask.key == ask.key for f in loading(node, room)))
    )
    if unseen and sent is not None:
        return None if _serves(sent, ask.reload_key, row, room) else "loaded for other options just now"
    return reload_reason(node, ask, row, room, resident) if resident else None


def slots_of(node: Node, ask: Ask, row: Model) -> int:
    """How many requests a runner of the model serves at a time."""
    return 1 if ask.task is Task.EMBED else slots_for(node.parallel, row)


def slots_for(parallel: int, row: Model) -> int:
    """How many requests a runner of the model ``row`` generates at a time, of ``parallel`` at most."""
    return 1 if str(row.details.get("family", "")).startswith(ONE_SLOT) else parallel


def reload_reason(node: Node, ask: Ask, row: Model, room: Room | None, resident: Resident) -> str | None:
    """Why the runner of ``resident`` must be loaded anew for ``ask``; None if it can serve it."""
    sent = node.loaded_with.get(ask.key)
    running = resident.context_length
    trained = _trained(row)
    if sent == ask.reload_key and (ask.num_ctx is None or running in (None, _clamp(ask.num_ctx, trained))):
        return None
    if sent is not None and _differ(sent, ask.reload_key):
        return "other options"
    if sent is None and _differ(ask.usual, ask.reload_key):
        return "options that may differ"
    if running is None:
        return None
    wanted = ask.num_ctx
    if wanted is None and room is not None:
        wanted = room.default_num_ctx
    if wanted is None:  # the default of a node without an agent: one of three
        alike = running in {_clamp(ctx, trained) for ctx in DEFAULTS}
        return None if alike else f"num_ctx {running} → default"
    wanted = _clamp(wanted, trained)
    return None if running == wanted else f"num_ctx {running} → {wanted}"


def runs_under(before: ReloadKey | None, asked: ReloadKey, loads: bool) -> ReloadKey:
    """The options of the runner that serves ``asked``: it keeps its layers, unless it ``loads`` for that."""
    layers = dict(before or ()).get("num_gpu")
    if loads or layers is None or "num_gpu" in dict(asked):
        return asked
    return tuple(sorted((*asked, ("num_gpu", layers))))


def loading(node: Node, room: Room | None) -> list[Flight]:
    """The requests for which the node is loading a model, or will, as far as is known here."""
    return [
        flight
        for flight in node.flights
        if flight.load and flight.first_byte_s is None and not _loaded(node, flight.ask, room)
    ]


def _shared_load(node: Node, ask: Ask, row: Model, room: Room | None) -> Flight | None:
    sharing = [
        flight
        for flight in loading(node, room)
        if flight.ask.key == ask.key and _serves(flight.ask.reload_key, ask.reload_key, row, room)
    ]
    # The first of them began the load; what the others expect has their queue in it.
    return min(sharing, key=lambda flight: flight.started_s, default=None)


def _loaded(node: Node, ask: Ask, room: Room | None) -> bool:
    resident, row = node.resident.get(ask.key), node.models.get(ask.key)
    return resident is not None and row is not None and reload_reason(node, ask, row, room, resident) is None


def _serves(loaded: ReloadKey, asked: ReloadKey, row: Model, room: Room | None) -> bool:
    """Whether a runner that was loaded for ``loaded`` can serve ``asked``."""
    if loaded == asked:
        return True
    default, trained = room.default_num_ctx if room else 0, _trained(row)
    contexts = [_clamp(dict(key).get("num_ctx", default), trained) for key in (loaded, asked)]
    return contexts[0] == contexts[1] and not _differ(loaded, asked)


def _fit(
    node: Node,
    ask: Ask,
    row: Model,
    room: Room | None,
    slots: int,
    shape: ModelShape | None,
    seen: Mapping[int, float],
    sharded: ShardModel | None,
    in_doubt: bool,
) -> Fit:
    if sharded is not None:
        return _sharded_fit(sharded, ask, row)
    if room is None:
        return Fit(True, note="memory unknown: no agent")
    if node.kind == "shard" or node.coordinator:
        return Fit(True, note="memory is its own concern")
    num_ctx = ask.num_ctx if ask.num_ctx is not None else room.default_num_ctx
    num_ctx = _clamp(num_ctx, shape.context_length if shape else _trained(row))
    need = memory.expected_bytes(shape, row.size, num_ctx, slots, seen)
    resident: Mapping[str, Resident] = node.resident
    unseen = [
        memory.Load(flight.ask.key, flight.need_bytes, flight.evicts)
        for flight in node.flights
        if flight.need_bytes and flight.ask.key != ask.key and flight.ask.key not in resident
    ]
    if unseen:
        room, resident = memory.once_loaded(room, resident, unseen)
    found = memory.fit(need, room, resident, ask.key, node.in_use, node.sessions)
    if found.fits or not in_doubt or ask.num_ctx is not None:
        return found
    without_cache = memory.need_bytes(shape, row.size, num_ctx=0)
    least = memory.fit(without_cache, room, resident, ask.key, node.in_use, node.sessions)
    doubt = f"may be too big: at num_ctx {num_ctx}, which is assumed, it {found.note}"
    return replace(least, note=doubt) if least.fits else found


def _sharded_fit(sharded: ShardModel, ask: Ask, row: Model) -> Fit:
    """What the coordinator itself says of the model, for the context that it was asked at."""
    if not sharded.fits:
        return Fit(
            False, note=f"does not fit its nodes: {sharded.why}" if sharded.why else "does not fit its nodes"
        )
    num_ctx = _clamp(ask.num_ctx if ask.num_ctx is not None else memory.SHARD_NUM_CTX, _trained(row))
    if sharded.largest_num_ctx is not None and num_ctx > sharded.largest_num_ctx:
        return Fit(False, note=f"holds it up to num_ctx {sharded.largest_num_ctx}, not {num_ctx}")
    return Fit(True, note="over several nodes")


def _differ(loaded: ReloadKey, asked: ReloadKey) -> bool:
    """Whether options other than num_ctx keep a runner from serving ``asked``.

    Who names no number of layers (num_gpu) takes what the runner has.
    """
    if loaded == asked:
        return False
    before, after = dict(loaded), dict(asked)
    after.setdefault("num_gpu", before.get("num_gpu", AS_FITS))
    before.setdefault("num_gpu", AS_FITS)
    return any(before.get(name) != after.get(name) for name in (before | after).keys() - {"num_ctx"})


def _trained(row: Model) -> int | None:
    value = row.details.get("context_length")
    return value if isinstance(value, int) and value > 0 else None


def _clamp(num_ctx: int, trained: int | None) -> int:
    return min(num_ctx, trained) if trained else num_ctx
