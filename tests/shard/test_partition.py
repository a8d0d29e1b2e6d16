"""The search against every layout there is, on rows small enough to try them all."""

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shard import partition
from shard.partition import Layout, Row, Slot

slot = st.builds(
    Slot,
    room_bytes=st.integers(0, 30),
    ms_per_byte=st.sampled_from([0.5, 1.0, 1.7, 3.0]),
    hop_ms=st.sampled_from([0.0, 0.5, 4.0]),
    output_ms=st.sampled_from([-0.1, 0.0, 1.0, 9.0]),
    remote=st.booleans(),
    first=st.sampled_from([False, False, False, True]),
)
layer = st.tuples(st.integers(1, 9), st.integers(0, 9).map(float))


def held_by(row: Row, slots: list[Slot], layout: Layout) -> list[int]:
    """What each segment takes; the last one has the output layer."""
    held = [row.memory[part.end] - row.memory[part.first] for part in layout.segments]
    held[-1] += row.output_bytes
    return held


def every_cost(row: Row, slots: list[Slot], most_remote: int) -> Iterator[float]:
    """The cost of every layout that fits: all orders of all subsets, all cuts."""
    for used in range(1, len(slots) + 1):
        for order in itertools.permutations(slots, used):
            if any(slot.first for slot in order[1:]) or sum(slot.remote for slot in order) > most_remote:
                continue
            for cuts in itertools.combinations_with_replacement(range(1, row.layers + 1), used - 1):
                bounds = [0, *cuts, row.layers]
                if any(start == end for start, end in itertools.pairwise(bounds[:-1])):
                    continue  # only the last may have no layer
                held = [row.memory[end] - row.memory[start] for start, end in itertools.pairwise(bounds)]
                held[-1] += row.output_bytes
                if all(bytes_ <= slot.room_bytes for bytes_, slot in zip(held, order, strict=True)):
                    work = [row.work[end] - row.work[start] for start, end in itertools.pairwise(bounds)]
                    yield order[-1].output_ms + sum(
                        slot.hop_ms + read * slot.ms_per_byte for read, slot in zip(work, order, strict=True)
                    )


@settings(max_examples=600, deadline=None)
@given(
    st.lists(layer, min_size=1, max_size=7), st.integers(0, 9), st.lists(slot, max_size=4), st.integers(1, 4)
)
@example([(1, 1.0)] * 6, 0, [Slot(2, 1.0, 0.5, 0.0)] * 3, 3)
def test_no_layout_is_cheaper(
    layers: list[tuple[int, float]], output_bytes: int, slots: list[Slot], most_remote: int
) -> None:
    row = Row([memory for memory, _ in layers], [work for _, work in layers], output_bytes)
    least = min(every_cost(row, slots, most_remote), default=None)
    layout = partition.cut(row, slots, most_remote)
    packed = partition.pack(row, slots, most_remote)
    if least is None:
        assert layout is None and packed is None
        return
    assert layout is not None and packed is not None
    assert layout.proven
    assert layout.ms == pytest.approx(least, abs=1e-9)
    assert partition.lower_bound(row, slots) <= least + 1e-9
    for found in (layout, packed):
        bounds = [found.segments[0].first, *(part.end for part in found.segments)]
        assert bounds[0] == 0 and bounds[-1] == row.layers
        assert all(a.end == b.first for a, b in itertools.pairwise(found.segments))
        for held, part in zip(held_by(row, slots, found), found.segments, strict=True):
            assert held <= slots[part.slot].room_bytes
        used = [slots[part.slot] for part in found.segments]
        assert not any(slot.first for slot in used[1:]) and sum(slot.remote for slot in used) <= most_remote
        assert len({part.slot for part in found.segments}) == len(found.segments)


def test_only_what_is_cheaper_than_asked_for_is_found() -> None:
    row, slots = Row([1, 1], [1.0, 1.0], 0), [Slot(9, 1.0, 0.0, 0.0)]
    assert partition.cut(row, slots, 1, below_ms=2.0) is None
    assert partition.cut(row, slots, 1, below_ms=2.1) is not None


def test_a_quick_search_says_that_it_proves_nothing() -> None:
    """Eleven unequal slots that are all needed, layers of eleven kinds: more states than are kept."""
    layers = [3 + (7 * index) % 11 for index in range(55)]
    row = Row(layers, [float(memory) for memory in layers], 5)
    slots = [Slot(44 + index, 1.0 + index / 10, 1.0, float(index % 3)) for index in range(11)]
    layout = partition.cut(row, slots, 15, quick=True)
    assert layout is not None and not layout.proven
    assert not math.isinf(partition.lower_bound(row, slots))
    assert layout.ms >= partition.lower_bound(row, slots)
