"""Which devices hold which layers of a model that fits on no single node, and what a token then costs.

Pure: a model's shape, hosts with what is free on them, and measured links go in; a plan comes out. What is
sought, in this order: the fewest nodes that hold the model, for each one more is a round trip a token and one
more thing to fail; then the least time per token, which leaves slow nodes and slow links out unless memory
forces them. The coordinator counts as a node: it runs llama-server and feeds the embeddings in. Ties are
broken by the order of names.

What a token costs (llama.cpp build 10434 over RPC, one sequence; measured: 24.6 tokens/s alone, 23.2 with one
rpc-server on loopback, 22.6 with two; 10 ms of RTT to each of two added 20.5 ms)::

    ms/token = Σ devices      (active weights + KV read at half the context) ÷ (bandwidth × share reached)
             + Σ RPC devices  round trip + activations in and out ÷ link + RPC_SERVER_MS
             + logits ÷ link, instead of activations out, if the last device is remote

llama.cpp's rules that shape a plan: layers are contiguous per device; layers on the coordinator's CPU come
first (what ``-ngl`` leaves there), then devices in ``-dev`` order, which is free; the output layer goes to
the last device; the input embedding stays in the coordinator's RAM, mapped from the file, so it takes room
from the CPU's layers but never forbids a plan; at most 15 RPC devices.

Every pair of devices talks through the coordinator, so only links between it and the others matter, and a
load passes through its link one tensor after another.

Cost of planning: sets of hosts are taken by size, those without the room are left out unseen, the others
are searched best bound first until no bound is below what was found; within a set ``partition.py`` is exact.
Plans of up to some six nodes are proven best within tens of milliseconds; see :data:`SETS` for where
exactness ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, Required, TypedDict, Unpack

from agent.links import Link
from shard import partition
from shard.shape import LayerShape, ModelShape, compute_buffer_bytes, input_buffer_bytes, kv_bytes

#: Share of the memory bandwidth that decoding one sequence reaches. GPUs: 50 to 60 % measured at batch size 1
#: (Databricks, "LLM Inference Performance Engineering", 2023). CPUs: llama.cpp reads quantised weights at
#: about two thirds of what a plain sum over the same memory measures.
BANDWIDTH_SHARE: Mapping[str, float] = {"gpu": 0.55, "cpu": 0.65}
#: Prompt tokens computed in the time of one decoded token, at full ubatches: GPUs have arithmetic to spare.
PREFILL_PER_DECODE: Mapping[str, float] = {"gpu": 25.0, "cpu": 4.0}
#: What each rpc-server adds beside its link: (1/22.6 - 1/24.6) s over two, less the logits' way.
RPC_SERVER_MS = 1.2
#: Ubatches of a prompt overlap over devices; measured 1.6 times faster with two, whatever more would bring.
PIPELINE_GAIN = 1.6
#: A model store's disk, between a SATA SSD (0.5) and NVMe or the page cache (2 to 10 GB/s).
DISK_BYTES_S = 1e9
#: ggml's RPC backend knows 16 devices (GGML_RPC_MAX_SERVERS), the reference names 15.
MOST_RPC_DEVICES = 15
ACTIVATION_BYTES = 4  #: activations and logits travel as f32
#: llama.cpp pads a context to this, so nothing in between saves memory.
CTX_STEP = 256
#: Sets of hosts of one size that get a bound, and those of them, best bound first, that are searched. Beyond
#: these, and beyond the width of a search in ``partition.py``, the best plan found is taken, and
#: ``Plan.reason`` says how far from the best one it is at most. Sets that have the room in bytes and yet hold
#: no layout are rare: after so many of them, one more node is taken.
SETS, LOOKS, VAIN_LOOKS = 1000, 16, 64
#: What is missing is told to this precision, rounded up.
MISSING_STEP_BYTES = 1 << 20

_MS = 1e3


@dataclass(frozen=True, slots=True)
class Device:
    """What layers can lie on. ``free_bytes`` is what a plan may fill: margins are off already."""

    host: str
    name: str  #: as llama.cpp calls it on its own host: CUDA0, Vulkan0, Metal, CPU
    kind: Literal["gpu", "cpu"]
    free_bytes: int
    bandwidth_bytes_s: float


@dataclass(frozen=True, slots=True)
class Host:
    """A node that lends its devices. One with unified memory has one device, its GPU or its CPU."""

    name: str
    devices: tuple[Device, ...]
    has_model: bool = False  #: the file lies here, so it can coordinate


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a model that one device holds."""

    device: Device
    first_layer: int
    layers: int  #: may be 0 where the device holds only the output layer
    output: bool
    weight_bytes: int  #: the output layer's included, and the input embedding's on the coordinator's CPU
    kv_bytes: int
    buffer_bytes: int
    ms: float  #: a token's, its way there and back included

    @property
    def memory_bytes(self) -> int:
        """All that it takes on its device."""
        return self.weight_bytes + self.kv_bytes + self.buffer_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model lies. ``shares`` are in llama.cpp's order of devices, which is that of the layers."""

    coordinator: str
    shares: tuple[Share, ...]
    num_ctx: int
    parallel: int
    ms_per_token: float
    prefill_tok_s: float
    load_s: float
    reason: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes taking part, the coordinator first."""
        return tuple(dict.fromkeys([self.coordinator, *(share.device.host for share in self.shares)]))

    def remote(self) -> tuple[Share, ...]:
        """The shares that lie behind an rpc-server."""
        return tuple(share for share in self.shares if share.device.host != self.coordinator)

    def flags(self, endpoints: Mapping[tuple[str, str], str]) -> list[str]:
        """llama-server's flags for this plan; ``endpoints`` maps (host, device) to its rpc-server.

        Each rpc-server has one device, so llama.cpp numbers them RPC0, RPC1, … as ``--rpc`` lists them.
        ``-ts`` gives counts of layers, the output layer one of them; ``-ngl`` is their sum, so that what is
        left at the front stays on the CPU.
        """
        remote = {share.device: f"RPC{number}" for number, share in enumerate(self.remote())}
        placed = [
            share
            for share in self.shares
            if share.device.host != self.coordinator or share.device.kind == "gpu"
        ]
        flags = []
        if remote:
            flags += ["--rpc", ",".join(endpoints[device.host, device.name] for device in remote)]
        counts = [share.layers + share.output for share in placed]
        names = [remote.get(share.device, share.device.name) for share in placed]
        flags += ["-dev", ",".join(names) or "none", "-ngl", str(sum(counts))]
        if len(counts) > 1:
            flags += ["-ts", ",".join(map(str, counts))]
        return [*flags, "-sm", "layer", "-fit", "off"]


@dataclass(frozen=True, slots=True)
class TooBig:
    """That a model fits nowhere, and by how much."""

    #: The least, in whole MiB, that makes it fit if the freest device gets it; more than needed - available
    #: where what is free lies in pieces that no layer fits.
    missing_bytes: int
    needed_bytes: int  #: weights, KV cache and one device's buffers
    available_bytes: int
    num_ctx: int
    #: The largest context, a multiple of 256 below the one asked for, at which it fits; None if none does.
    largest_num_ctx: int | None


def plan(
    shape: ModelShape,
    hosts: Sequence[Host],
    links: Mapping[tuple[str, str], Link],
    *,
    num_ctx: int,
    parallel: int = 1,
    num_batch: int = 512,
    embeddings: bool = False,
    coordinator: str | None = None,
) -> Plan | TooBig:
    """Return the plan for ``shape`` at ``num_ctx``, for ``parallel`` sequences of it each.

    ``embeddings``: llama-server runs with that flag, and computes logits for each token of a batch. ``links``
    maps (coordinator, other) to the link between them; a host without one cannot take part. Raises
    ValueError where no host could coordinate: none has the model, or ``coordinator`` is no known host.
    """
    fleet = _fleet(hosts, links, coordinator)
    task = _Task(shape, num_ctx, parallel, num_batch, embeddings)
    if not fleet.fits(task):
        return fleet.too_big(task)
    return fleet.best(task)


def largest_num_ctx(
    shape: ModelShape,
    hosts: Sequence[Host],
    links: Mapping[tuple[str, str], Link],
    *,
    most: int,
    parallel: int = 1,
    num_batch: int = 512,
    coordinator: str | None = None,
) -> int | None:
    """Return the largest context up to ``most`` at which :func:`plan` finds room, None if there is none.

    Below ``most`` it is a multiple of :data:`CTX_STEP`.
    """
    fleet = _fleet(hosts, links, coordinator)
    task = _Task(shape, most, parallel, num_batch, embeddings=False)
    return most if fleet.fits(task) else fleet.largest_num_ctx(task)


def _fleet(hosts: Sequence[Host], links: Mapping[tuple[str, str], Link], coordinator: str | None) -> _Fleet:
    candidates = [
        host for host in hosts if (host.has_model if coordinator is None else host.name == coordinator)
    ]
    if not candidates:
        raise ValueError(
            "no host has the model's file" if coordinator is None else f"{coordinator} is no known host"
        )
    return _Fleet(
        tuple(sorted(hosts, key=lambda host: host.name)),
        links,
        tuple(sorted(host.name for host in candidates)),
    )


class Asked(TypedDict, total=False):
    """How a model is to run: the keywords of :func:`plan`."""

    num_ctx: Required[int]
    parallel: int
    num_batch: int
    embeddings: bool
    coordinator: str | None


def choose(
    shape: ModelShape,
    hosts: Sequence[Host],
    links: Mapping[tuple[str, str], Link],
    **asked: Unpack[Asked],
) -> Plan | TooBig:
    """Return the plan over GPUs alone or that over all devices, whichever is faster; else as :func:`plan`.

    The fewest nodes are not the fastest where one of them would compute most layers on its CPU.
    """
    everything = plan(shape, hosts, links, **asked)
    if isinstance(everything, TooBig) or all(share.device.kind == "gpu" for share in everything.shares):
        return everything
    gpus = [
        replace(host, devices=tuple(device for device in host.devices if device.kind == "gpu"))
        for host in hosts
    ]
    fast = plan(shape, gpus, links, **asked) if any(host.devices for host in gpus) else everything
    return fast if isinstance(fast, Plan) and fast.ms_per_token < everything.ms_per_token else everything


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A model at a context, and what follows for one device."""

    shape: ModelShape
    num_ctx: int
    parallel: int
    num_batch: int
    embeddings: bool
    row: partition.Row = field(init=False)
    #: Scratch memory of a device with layers, of the one with the output layer too, of llama-server itself.
    buffer_bytes: int = field(init=False)
    output_buffer_bytes: int = field(init=False)
    input_buffer_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        memory = [layer.weight_bytes + self.kv_bytes(layer) for layer in shape.layers]
        work = [layer.active_bytes + self._kv_read_bytes(layer) for layer in shape.layers]
        size = shape, self.num_ctx, self.num_batch
        output_buffer_bytes = compute_buffer_bytes(*size, output=True, embeddings=self.embeddings)
        more_bytes = output_buffer_bytes - (buffer_bytes := compute_buffer_bytes(*size))
        for name, value in {
            "row": partition.Row(memory, work, shape.output_bytes + more_bytes),
            "buffer_bytes": buffer_bytes,
            "output_buffer_bytes": output_buffer_bytes,
            "input_buffer_bytes": input_buffer_bytes(*size),
        }.items():
            object.__setattr__(self, name, value)

    def kv_bytes(self, layer: LayerShape) -> int:
        return kv_bytes(layer, self.num_ctx, self.parallel, self.num_batch)

    def _kv_read_bytes(self, layer: LayerShape) -> float:
        """What a token reads of the cache when half of the context is filled."""
        cells = self.num_ctx / 2
        if layer.window is not None:
            cells = min(cells, layer.window)
        return cells * layer.kv_bytes_per_cell + layer.state_bytes

    @property
    def local_cpu_bytes(self) -> int:
        """What lies in the coordinator's RAM whoever computes."""
        return self.shape.embedding_bytes + self.input_buffer_bytes

    @property
    def needed_bytes(self) -> int:
        # Not the input embedding: it lies in the coordinator's file cache, and takes room from layers only.
        return self.row.total_bytes + self.buffer_bytes

    def slot(self, device: Device, link: Link | None) -> partition.Slot:
        """``device`` as the search sees it, behind ``link`` or on the coordinator itself."""
        shape, ms_per_byte = self.shape, _ms_per_byte(device)
        room_bytes = device.free_bytes - self.buffer_bytes
        output_ms = shape.output_bytes * ms_per_byte
        if link is None:
            local_cpu = device.kind == "cpu"
            room_bytes -= self.local_cpu_bytes if local_cpu else 0
            return partition.Slot(room_bytes, ms_per_byte, 0.0, output_ms, first=local_cpu)
        activations_ms = shape.embedding_length * ACTIVATION_BYTES / link.bytes_s * _MS
        logits_ms = shape.vocab * ACTIVATION_BYTES / link.bytes_s * _MS
        hop_ms = link.rtt_s * _MS + RPC_SERVER_MS + 2 * activations_ms
        return partition.Slot(
            room_bytes, ms_per_byte, hop_ms, output_ms + logits_ms - activations_ms, remote=True
        )


def _ms_per_byte(device: Device) -> float:
    return _MS / (device.bandwidth_bytes_s * BANDWIDTH_SHARE[device.kind])


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A host that may take part, seen from one coordinator."""

    host: Host
    slots: tuple[partition.Slot, ...]

    @property
    def room_bytes(self) -> int:
        return sum(max(slot.room_bytes, 0) for slot in self.slots)

    def slowness(self) -> tuple[float, float, int]:
        """Equal for equal hosts; fast ones on fast links first."""
        fastest = min((slot.ms_per_byte for slot in self.slots), default=math.inf)
        hop_ms = min((slot.hop_ms for slot in self.slots), default=math.inf)
        return fastest, hop_ms, -self.room_bytes


#: Hosts that may hold a model together, the coordinator first.
type _Set = tuple[_Candidate, ...]


def _sets(row: partition.Row, chosen: _Set, rest: Sequence[_Candidate], more: int) -> Iterator[_Set]:
    """``chosen`` and ``more`` of ``rest`` in all ways that have the room, those with the fast ones first."""
    if more == 0:
        yield chosen
        return
    room_bytes = sum(candidate.room_bytes for candidate in chosen)
    for index in range(len(rest) - more + 1):
        rooms = sorted((candidate.room_bytes for candidate in rest[index:]), reverse=True)[:more]
        if room_bytes + sum(rooms) < row.total_bytes:
            return
        # A host like the one before it only stands for that one's sets again.
        if not index or rest[index].slots != rest[index - 1].slots:
            yield from _sets(row, (*chosen, rest[index]), rest[index + 1 :], more - 1)


def _best_set(
    row: partition.Row, arounds: Sequence[Sequence[_Candidate]], nodes: int
) -> tuple[_Set, partition.Layout, float] | None:
    """The cheapest of the sets of ``nodes`` hosts, each with one coordinator and those ``around`` it.

    With it what any cheaper one that was not found costs at least; infinite if there is none.
    """
    bounds: list[tuple[float, _Set]] = []
    unseen_ms = math.inf
    for around in arounds:
        sets = _sets(row, tuple(around[:1]), around[1:], nodes - 1)
        bounds += [(_bound_ms(row, chosen), chosen) for chosen in islice(sets, SETS // len(arounds))]
        if next(sets, None) is not None:
            unseen_ms = min(unseen_ms, _bound_ms(row, around))
    best: tuple[_Set, partition.Layout] | None = None
    best_ms = math.inf
    for count, (bound_ms, chosen) in enumerate(sorted(bounds, key=lambda bound: bound[0])):
        if bound_ms >= best_ms * (1 - partition.TIE) or math.isinf(bound_ms):
            break
        if count >= (VAIN_LOOKS if best is None else LOOKS):
            unseen_ms = min(unseen_ms, bound_ms)
            break
        # Once something is not proven, the rest is looked at quickly.
        quick = not math.isinf(unseen_ms)
        layout = partition.cut(row, _slots(chosen), MOST_RPC_DEVICES, best_ms, quick=quick)
        if layout is None:
            continue
        best, best_ms = (chosen, layout), layout.ms
        if not layout.proven:
            unseen_ms = min(unseen_ms, bound_ms)
    return best and (*best, unseen_ms)


def _slots(candidates: Sequence[_Candidate]) -> list[partition.Slot]:
    return [slot for candidate in candidates for slot in candidate.slots]


def _bound_ms(row: partition.Row, candidates: Sequence[_Candidate]) -> float:
    return partition.lower_bound(row, _slots(candidates))


@dataclass(frozen=True, slots=True)
class _Fleet:
    """Hosts by name, the links between them, and who may coordinate."""

    hosts: tuple[Host, ...]
    links: Mapping[tuple[str, str], Link]
    coordinators: tuple[str, ...]

    def around(self, coordinator: str, task: _Task) -> list[_Candidate]:
        """The coordinator, and all that it reaches, the fast ones first."""
        own: list[_Candidate] = []
        others: list[_Candidate] = []
        for host in self.hosts:
            link = self.links.get((coordinator, host.name))
            if host.name == coordinator:
                own.append(_Candidate(host, tuple(task.slot(device, None) for device in host.devices)))
            elif link is not None:
                others.append(_Candidate(host, tuple(task.slot(device, link) for device in host.devices)))
        return own + sorted(others, key=_Candidate.slowness)

    def fits(self, task: _Task) -> bool:
        """Whether all hosts together hold the model, under any coordinator."""
        return any(
            partition.pack(task.row, _slots(self.around(name, task)), MOST_RPC_DEVICES) is not None
            for name in self.coordinators
        )

    def best(self, task: _Task) -> Plan:
        """The best plan of the fewest nodes; there is one."""
        around = [self.around(name, task) for name in self.coordinators]
        for nodes in range(1, len(self.hosts) + 1):
            if found := _best_set(task.row, around, nodes):
                chosen, layout, unseen_ms = found
                hosts = [candidate.host for candidate in chosen]
                return _plan(task, hosts, layout, self.links, unseen_ms)
        raise AssertionError("what all hosts hold, some set of hosts holds")

    def usable(self) -> list[Host]:
        """The hosts that coordinate, or that one that does reaches."""
        return [
            host
            for host in self.hosts
            if any(name == host.name or (name, host.name) in self.links for name in self.coordinators)
        ]

    def with_more(self, freest: Device, extra_bytes: int) -> _Fleet:
        """This fleet, with ``extra_bytes`` more on one device."""
        more = replace(freest, free_bytes=freest.free_bytes + extra_bytes)
        hosts = tuple(
            replace(host, devices=tuple(more if device == freest else device for device in host.devices))
            for host in self.hosts
        )
        return replace(self, hosts=hosts)

    def too_big(self, task: _Task) -> TooBig:
        """By how much ``task`` is too big, and at which context it is not."""
        devices = [device for host in self.usable() for device in host.devices]
        if not devices:
            return TooBig(task.needed_bytes, task.needed_bytes, 0, task.num_ctx, None)
        freest = max(devices, key=lambda device: device.free_bytes)

        def fits_with(steps: int) -> bool:
            return self.with_more(freest, steps * MISSING_STEP_BYTES).fits(task)

        most_bytes = task.needed_bytes + task.local_cpu_bytes + max(-freest.free_bytes, 0)
        most = most_bytes // MISSING_STEP_BYTES + 1
        return TooBig(
            missing_bytes=_first(1, most, fits_with) * MISSING_STEP_BYTES,
            needed_bytes=task.needed_bytes,
            available_bytes=sum(
                max(device.free_bytes, 0) for host in self.usable() for device in host.devices
            ),
            num_ctx=task.num_ctx,
            largest_num_ctx=self.largest_num_ctx(task),
        )

    def largest_num_ctx(self, task: _Task) -> int | None:
        """At which context ``task``, which is too big at its own, would fit."""

        def too_big_at(steps: int) -> bool:
            return not self.fits(replace(task, num_ctx=steps * CTX_STEP))

        steps = _first(1, (task.num_ctx - 1) // CTX_STEP + 1, too_big_at) - 1
        return steps * CTX_STEP or None


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least number from ``low`` to ``high`` that ``holds``, all above it doing so; ``high`` if none."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _plan(
    task: _Task,
    hosts: Sequence[Host],
    layout: partition.Layout,
    links: Mapping[tuple[str, str], Link],
    bound_ms: float,
) -> Plan:
    """``layout`` in the terms of hosts and devices, the coordinator being the first host."""
    coordinator, shape, row = hosts[0].name, task.shape, task.row
    devices = [device for host in hosts for device in host.devices]
    shares: list[Share] = []
    stages_ms: list[float] = []
    load_s = 0.0
    for segment in layout.segments:
        device = devices[segment.slot]
        link = None if device.host == coordinator else links[coordinator, device.host]
        slot = task.slot(device, link)
        layers = shape.layers[segment.first : segment.end]
        output = segment is layout.segments[-1]
        weight_bytes = sum(layer.weight_bytes for layer in layers) + (shape.output_bytes if output else 0)
        shares.append(
            Share(
                device=device,
                first_layer=segment.first,
                layers=len(layers),
                output=output,
                weight_bytes=weight_bytes + (shape.embedding_bytes if slot.first else 0),
                kv_bytes=sum(task.kv_bytes(layer) for layer in layers),
                buffer_bytes=(task.output_buffer_bytes if output else task.buffer_bytes)
                + (task.input_buffer_bytes if slot.first else 0),
                ms=partition.price(row, slot, segment.first, segment.end) + (slot.output_ms if output else 0),
            )
        )
        load_s += weight_bytes / min(DISK_BYTES_S, link.bytes_s if link else math.inf)
        work_ms = (row.work[segment.end] - row.work[segment.first]) * slot.ms_per_byte
        activations = 2 * task.num_batch * shape.embedding_length * ACTIVATION_BYTES
        stages_ms.append(
            task.num_batch * work_ms / PREFILL_PER_DECODE[device.kind]
            + (link.rtt_s * _MS + RPC_SERVER_MS + activations / link.bytes_s * _MS if link else 0.0)
        )
    ubatch_ms = max(max(stages_ms), sum(stages_ms) / PIPELINE_GAIN)
    return Plan(
        coordinator=coordinator,
        shares=tuple(shares),
        num_ctx=task.num_ctx,
        parallel=task.parallel,
        ms_per_token=layout.ms,
        prefill_tok_s=task.num_batch / ubatch_ms * _MS if ubatch_ms else math.inf,
        load_s=load_s,
        reason=_reason(hosts, layout.ms, bound_ms),
    )


def _reason(hosts: Sequence[Host], ms: float, bound_ms: float) -> str:
    if len(hosts) == 1:
        sentence = f"{hosts[0].name} holds it alone"
    else:
        sentence = f"{len(hosts)} nodes are the fewest that hold it"
    if bound_ms < ms * (1 - 1e-3):
        return f"{sentence}; the least ms/token found, at most {ms / bound_ms - 1:.1%} above the best"
    return f"{sentence}, and nothing is faster with as many"
