"""Cut a row of layers into contiguous segments, one a device, at the least time: exactly.

A :class:`Row` is what has to be placed, a :class:`Slot` is a device that may take a segment. A segment takes
memory that depends on its layers only, and time that is its work × the slot's ``ms_per_byte`` plus a charge
for using the slot at all. Which slots are used and in which order they stand is free, except that a ``first``
slot can stand only at the head. The slot at the end holds the output layer too, and may hold nothing else.

The search places slots from the left and keeps, for each (slots used, layers placed), only the cheapest way.
Three observations keep it small:

*Boundaries are not free.* Moving the boundary of two neighbours by one layer saves that layer's work × the
difference of their speeds, wherever the boundary is. So some best layout has each boundary as far toward the
slower neighbour as the faster one's memory allows: a slot ends where it is full, or where its right
neighbour is strictly faster and full to the left.

*The rest has a price.* The work that is left costs at least what it would if it could be poured into the
free slots, the best first, each up to the most work of any run of layers that fits it. Equal layers make this
bound exact.

*Twins are taken in order.* Slots alike in everything are interchangeable.

The number of states grows with 2^slots for unequal slots in the worst case, where every slot is needed and no
layer equals another (minimum bin packing hides in there); the width of the search is therefore bounded, and
the answer says whether the bound was met, that is whether it is proven best.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

#: Equal costs that were added up in different orders differ by rounding; what is this close is a tie.
TIE = 1e-11
#: States kept after each placed slot: of the first, quick pass, which only finds something good to beat, ...
_NARROW = 4
#: ... and of the pass that proves it best, so that it takes at most some 0.4 s for 126 layers.
_WIDE_STATES_X_SLOTS = 1000
#: Layers are alike in work per byte up to this factor; beyond it the bound looks at each layer's.
_EVEN = 1.5
#: Sets of used slots kept while looking for any layout that fits; exact for up to 10 unequal slots, 2^10 / 4.
_PACKINGS = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """A device as the search sees it."""

    room_bytes: int  #: for layers and the output layer
    ms_per_byte: float
    hop_ms: float  #: once, if it holds anything
    output_ms: float  #: more, if it holds the output layer (less, where that saves an activation)
    remote: bool = False
    first: bool = False  #: can only stand at the head


@dataclass(frozen=True, slots=True)
class Runs:
    """For each layer: where the longest segment ends that starts there and fits some room; and the most that
    any such segment has that starts there or behind."""

    ends: list[int]
    most_work: list[float]
    most_bytes: list[int]
    most_layers: list[int]


def _most_behind[N: (int, float)](values: Sequence[N]) -> list[N]:
    return list(accumulate(reversed(values), max))[::-1]


class Row:
    """The layers that are placed, and the output layer behind them."""

    def __init__(self, memory_bytes: Sequence[int], work_bytes: Sequence[float], output_bytes: int) -> None:
        self.layers = len(memory_bytes)
        self.memory = list(accumulate(memory_bytes, initial=0))
        self.work = list(accumulate(work_bytes, initial=0.0))
        self.output_bytes = output_bytes
        densities = [work / memory for work, memory in zip(work_bytes, memory_bytes, strict=True)]
        self._order = sorted(range(self.layers), key=lambda layer: -densities[layer])
        #: Whether layers differ in work per byte of memory, as dense ones do from those with experts.
        self.uneven = max(densities, default=0.0) > _EVEN * min(densities, default=0.0)
        self._runs: dict[int, Runs] = {}
        self._densest: dict[int, tuple[list[int], list[float]]] = {}

    @property
    def total_bytes(self) -> int:
        """All layers and the output layer."""
        return self.memory[-1] + self.output_bytes

    def runs(self, room_bytes: int) -> Runs:
        """The longest segments that ``room_bytes`` hold."""
        known = self._runs.get(room_bytes)
        if known is None:
            known = self._runs[room_bytes] = self._find_runs(room_bytes)
        return known

    def _find_runs(self, room_bytes: int) -> Runs:
        ends, end = [], 0
        for start in range(self.layers + 1):
            end = max(end, start)
            while end < self.layers and self.memory[end + 1] - self.memory[start] <= room_bytes:
                end += 1
            ends.append(end)
        work = [self.work[end] - self.work[start] for start, end in enumerate(ends)]
        memory = [self.memory[end] - self.memory[start] for start, end in enumerate(ends)]
        count = [end - start for start, end in enumerate(ends)]
        return Runs(ends, _most_behind(work), _most_behind(memory), _most_behind(count))

    def densest(self, start: int) -> tuple[list[int], list[float]]:
        """Memory and work of the layers from ``start`` on, those with most work a byte first, added up."""
        known = self._densest.get(start)
        if known is None:
            order = [layer for layer in self._order if layer >= start]
            memory = accumulate((self.memory[layer + 1] - self.memory[layer] for layer in order), initial=0)
            work = accumulate((self.work[layer + 1] - self.work[layer] for layer in order), initial=0.0)
            known = self._densest[start] = list(memory), list(work)
        return known

    def finishes(self, start: int, slot: Slot) -> bool:
        """Whether ``slot`` holds all from layer ``start`` on, and the output layer."""
        return self.memory[-1] - self.memory[start] + self.output_bytes <= slot.room_bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers ``first`` to ``end`` (exclusive) on the slot at ``slot``."""

    slot: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments from left to right, the last with the output layer."""

    segments: tuple[Segment, ...]
    ms: float
    proven: bool = True  #: nothing costs less


def price(row: Row, slot: Slot, first: int, end: int) -> float:
    """What layers ``first`` to ``end`` cost on ``slot``, the output layer aside."""
    return slot.hop_ms + (row.work[end] - row.work[first]) * slot.ms_per_byte


def lower_bound(row: Row, slots: Sequence[Slot]) -> float:
    """No layout over some of ``slots`` costs less; infinite if there is certainly none."""
    return _pour(row, 0, slots, [row.runs(slot.room_bytes) for slot in slots])


def _pour(row: Row, start: int, slots: Sequence[Slot], runs: Sequence[Runs]) -> float:
    """What layers ``start`` on and the output layer cost at least on ``slots``; infinite if too much."""
    left = row.work[-1] - row.work[start]
    bytes_, layers, room = 0, 0, 0
    cost = math.inf
    pours: list[tuple[float, float]] = []
    for slot, run in zip(slots, runs, strict=True):
        if slot.room_bytes >= row.output_bytes and slot.output_ms < cost:
            cost = slot.output_ms
        if slot.room_bytes > 0:
            room += slot.room_bytes
        bytes_ += run.most_bytes[start]
        layers += run.most_layers[start]
        if (most := run.most_work[start]) > 0:
            pours.append((slot.ms_per_byte + slot.hop_ms / most, most))
    rest_bytes = row.memory[-1] - row.memory[start]
    if bytes_ < rest_bytes or layers < row.layers - start or room < rest_bytes + row.output_bytes:
        return math.inf
    paired_ms = cost + _pair(row, start, slots, runs) if row.uneven else -math.inf
    pours.sort()
    for ratio, most in pours:
        if left <= most:
            cost += left * ratio
            break
        cost += most * ratio
        left -= most  # what is left over in the end by rounding alone has a place
    return max(cost, paired_ms)


def _pair(row: Row, start: int, slots: Sequence[Slot], runs: Sequence[Runs]) -> float:
    """What layers ``start`` on cost at least if the fastest slots get those with most work a byte.

    Layers may be cut anywhere for that. Where layers differ much this says more than :func:`_pour`, in which
    every slot may take the run with most work; it says less of the hops.
    """
    memory, work = row.densest(start)
    rest_bytes, cost, filled, done = memory[-1], 0.0, 0, 0.0
    for ms_per_byte, most in sorted(
        (slot.ms_per_byte, run.most_bytes[start]) for slot, run in zip(slots, runs, strict=True)
    ):
        filled += most
        layer = bisect_right(memory, filled) - 1
        reached = work[layer]
        if layer < len(memory) - 1:
            part = (filled - memory[layer]) / (memory[layer + 1] - memory[layer])
            reached += part * (work[layer + 1] - work[layer])
        cost += (reached - done) * ms_per_byte
        done = reached
        if filled >= rest_bytes:
            break
    hops = sorted(
        (slot.hop_ms / most, most)
        for slot, run in zip(slots, runs, strict=True)
        if (most := run.most_bytes[start])
    )
    for ratio, most in hops:
        cost += ratio * min(most, rest_bytes)
        rest_bytes -= min(most, rest_bytes)
    return cost


def pack(row: Row, slots: Sequence[Slot], most_remote: int) -> Layout | None:
    """Any layout that fits, and None only if there is none (up to ``_PACKINGS`` sets of used slots)."""
    return _Search(row, slots, most_remote).pack()


def cut(
    row: Row, slots: Sequence[Slot], most_remote: int, below_ms: float = math.inf, *, quick: bool = False
) -> Layout | None:
    """The cheapest layout that costs less than ``below_ms``; None if there is none.

    ``quick``: content with what the first pass finds, proven or not.
    """
    search = _Search(row, slots, most_remote)
    best: Layout | None = None
    if math.isinf(below_ms):
        best = search.pack()
        if best is None:
            return None
        below_ms = best.ms
    better, proven = search.cheapest(below_ms, _NARROW)
    if better is not None:
        best, below_ms = better, better.ms
    if not proven and not quick:
        better, proven = search.cheapest(below_ms, _WIDE_STATES_X_SLOTS // len(slots))
        best = better or best
    return best and Layout(best.segments, best.ms, proven)


#: The way to a state: the way before it, and the segment that was added.
type _Way = tuple[_Way, Segment] | None


class _Search:
    """One search. Sets of slots are bit masks."""

    def __init__(self, row: Row, slots: Sequence[Slot], most_remote: int) -> None:
        self.row, self.slots, self.most_remote = row, slots, most_remote
        self.runs = [row.runs(slot.room_bytes) for slot in slots]
        self._rests: dict[int, tuple[list[Slot], list[Runs]]] = {}
        self.remote = sum(1 << index for index, slot in enumerate(slots) if slot.remote)
        seen: dict[Slot, int] = {}
        #: for each slot, the bit of the twin that has to be used before it
        self.before = [0] * len(slots)
        for index, slot in enumerate(slots):
            if slot in seen:
                self.before[index] = 1 << seen[slot]
            seen[slot] = index

    def free(self, used: int) -> list[int]:
        """The slots that may be placed next."""
        full = (used & self.remote).bit_count() >= self.most_remote
        return [
            index
            for index, slot in enumerate(self.slots)
            if not used >> index & 1
            and (used & self.before[index]) == self.before[index]
            and not (slot.first and used)
            and not (slot.remote and full)
        ]

    def bound(self, used: int, start: int) -> float:
        """What layers ``start`` on and the output layer cost at least on slots not in ``used``."""
        rest = self._rests.get(used)
        if rest is None:
            rest = self._rests[used] = self._rest(used)
        return _pour(self.row, start, *rest)

    def _rest(self, used: int) -> tuple[list[Slot], list[Runs]]:
        """The slots that are still free once ``used`` are, and their runs."""
        left = [
            index for index, slot in enumerate(self.slots) if not (used >> index & 1 or (slot.first and used))
        ]
        return [self.slots[index] for index in left], [self.runs[index] for index in left]

    def cheapest(self, below_ms: float, width: int) -> tuple[Layout | None, bool]:
        """The cheapest layout below ``below_ms`` on ``width`` states a step; whether nothing was left out."""
        row, best, proven = self.row, None, True
        # (used slots, layers placed, last slot if it could hold more else -1) → (cost, way)
        level: dict[tuple[int, int, int], tuple[float, _Way]] = {(0, 0, -1): (0.0, None)}
        while level:
            following: dict[tuple[int, int, int], tuple[float, _Way]] = {}
            for (used, start, unfilled), (cost, way) in level.items():
                for index in self.free(used):
                    slot = self.slots[index]
                    if unfilled >= 0 and slot.ms_per_byte >= self.slots[unfilled].ms_per_byte:
                        continue
                    if row.finishes(start, slot) and not (unfilled >= 0 and row.finishes(start - 1, slot)):
                        ms = cost + price(row, slot, start, row.layers) + slot.output_ms
                        if ms < below_ms - TIE * abs(below_ms):
                            below_ms = ms
                            best = Layout(_segments((way, Segment(index, start, row.layers))), ms)
                    longest = self.runs[index].ends[start]
                    shortest = start + 1
                    if unfilled >= 0:  # must be full to the left: what begins one layer earlier does not fit
                        shortest = max(shortest, self.runs[index].ends[start - 1] + 1)
                    taken = used | 1 << index
                    for end in range(shortest, longest + 1):
                        key = (taken, end, -1 if end == longest else index)
                        ms = cost + price(row, slot, start, end)
                        known = following.get(key)
                        if known is None or ms < known[0]:
                            following[key] = ms, (way, Segment(index, start, end))
            ranked = []
            for key, (ms, _) in following.items():
                used, end, unfilled = key
                if unfilled >= 0 and (full := following.get((used, end, -1))) and full[0] <= ms:
                    continue  # what is full may go on in more ways
                least_ms = ms + self.bound(used, end)
                if least_ms < below_ms - TIE * abs(below_ms):
                    ranked.append((least_ms, key))
            if len(ranked) > width:
                proven = False
                ranked.sort()
                del ranked[width:]
            level = {key: following[key] for _, key in ranked}
        return best, proven

    def pack(self) -> Layout | None:
        """Any layout that fits: for a set of used slots only the one that places most layers matters."""
        if math.isinf(self.bound(0, 0)):
            return None
        for width in (1, _PACKINGS):
            level: dict[int, tuple[int, _Way]] = {0: (0, None)}
            while level:
                following: dict[int, tuple[int, _Way]] = {}
                for used, (start, way) in level.items():
                    for index in self.free(used):
                        if self.row.finishes(start, self.slots[index]):
                            return self._priced(_segments((way, Segment(index, start, self.row.layers))))
                        end, taken = self.runs[index].ends[start], used | 1 << index
                        known = following.get(taken)
                        if end == start or (known is not None and known[0] >= end):
                            continue
                        if not math.isinf(self.bound(taken, end)):
                            following[taken] = end, (way, Segment(index, start, end))
                if len(following) > width:
                    ranked = sorted(following, key=lambda taken: -following[taken][0])
                    following = {taken: following[taken] for taken in ranked[:width]}
                level = following
        return None

    def _priced(self, segments: tuple[Segment, ...]) -> Layout:
        ms = sum(price(self.row, self.slots[part.slot], part.first, part.end) for part in segments)
        return Layout(segments, ms + self.slots[segments[-1].slot].output_ms, proven=False)


def _segments(way: _Way) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    while way is not None:
        way, segment = way
        segments.append(segment)
    return tuple(reversed(segments))
