"""The line: who waits, and in which order. Pure; time is an argument.

A *flow* is what one client waits for at one priority, first come first served. Only its head ages: a client
with five hundred requests has one that gets older, or they would all overtake together once they are old.

**Between priorities** all heads go up by one at every tick of a clock of ``ageing_s`` seconds: with ``tick``
the number of the tick before which a head came to be one, ``tick - priority`` never changes, and the lowest
is next; of equals the higher priority. So a higher priority ``q`` goes before a lower one ``p`` if it comes
at most ``(q - p) × ageing_s`` later, and not if it comes ``(q - p + 1) × ageing_s`` later.

**Within a priority** clients share by weight: start-time fair queuing (Goyal, Vin, Cheng 1996). A flow's tag
grows by cost ÷ weight with each request that is started, the lowest tag is next, and who comes anew begins at
the tag that was started last: what a client had while nobody waited is not held against it. Weights hold
among heads that came up within the same ``(11 - p) × ageing_s``; older ones go first, since a stream of ever
new clients must not hold one back for ever.

Together: **a head of priority p is never overtaken by what comes more than (12 - p) × ageing_s after it came
up**, :func:`bound_s`; the n-th request of a flow by nothing that comes n times as long after it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count

HIGHEST = 10

#: (age group, tag, number of the item, flow): what flows of one priority are sorted by.
_Key = tuple[int, float, int, "_Flow"]
#: (when its head came up, number, flow)
_Age = tuple[float, int, "_Flow"]
FORGET_FROM = 64  #: flows without items that owe nothing are forgotten together, from so many on


def bound_s(priority: int, ageing_s: float) -> float:
    """How long after a head of ``priority`` came up others may come and still go before it, at most."""
    return (HIGHEST + 2 - priority) * ageing_s


@dataclass(eq=False, slots=True, kw_only=True)
class Item:
    """What the line needs to know of a request."""

    client: str = ""
    priority: int = 5
    weight: float = 1.0
    cost_s: float = 1.0  #: what its client is charged: the expected seconds of work
    arrived_s: float
    # The line's own, and kept where a request comes back (its node failed):
    number: int = 0  #: its place among arrivals
    since_s: float | None = None  #: when it came up as the head of its flow
    tag: float | None = None  #: at which it was started, so that nobody pays twice


@dataclass(eq=False, slots=True)
class _Flow:
    client: str
    tag: float  #: at which its head starts
    items: list[Item] = field(default_factory=list)
    work_s: float = 0.0  #: what all items cost
    key: _Key | None = None  #: under which it stands in its level's ``order``
    age: _Age | None = None  #: and in ``ages``

    def put(self, item: Item) -> None:
        """Before all that arrived later."""
        insort(self.items, item, key=_arrival)


@dataclass(eq=False, slots=True)
class _Level:
    """All that wait at one priority."""

    priority: int
    virtual: float = 0.0  #: the tag that was started last
    flows: dict[str, _Flow] = field(default_factory=dict)  #: also those without items, while they owe
    order: list[_Key] = field(default_factory=list)  #: of flows with items
    ages: list[_Age] = field(default_factory=list)  #: the same flows, the oldest head first
    size: int = 0
    work_s: float = 0.0

    def forget(self) -> None:
        """Drop the flows that neither wait nor owe anything, once there are many."""
        if len(self.flows) >= FORGET_FROM + 2 * len(self.order):
            self.flows = {
                client: flow for client, flow in self.flows.items() if flow.items or flow.tag > self.virtual
            }


class Line[T: Item]:
    """Requests that wait. Every change is logarithmic in the number of flows, but for moving memory."""

    def __init__(self, ageing_s: float) -> None:
        self.ageing_s = ageing_s
        self._levels: dict[int, _Level] = {}
        self._size = 0
        self._numbers = count(1)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, item: T) -> bool:
        flow = self._flow(item)
        return flow is not None and item in flow.items

    def depth(self) -> Counter[int]:
        """How many wait, by priority; only priorities at which somebody has ever waited."""
        return Counter({priority: level.size for priority, level in self._levels.items()})

    def add(self, item: T, now_s: float) -> None:
        """Let ``item`` wait. One that was here before stands where it stood, and its age has gone on."""
        if not item.number:
            item.number = next(self._numbers)
        level = self._level(item.priority)
        flow = level.flows.get(item.client)
        if flow is None:
            level.forget()
            flow = level.flows[item.client] = _Flow(item.client, level.virtual)
        if not flow.items:
            flow.tag = max(flow.tag, level.virtual)
        flow.put(item)
        level.size += 1
        self._size += 1
        level.work_s += item.cost_s
        flow.work_s += item.cost_s
        if flow.items[0] is item:
            self._came_up(level, flow, now_s)

    def pass_by(self, item: T, now_s: float) -> None:
        """As :meth:`add` and :meth:`start` at once, where nobody waits: then nothing is owed afterwards."""
        level = self._level(item.priority)
        if not item.number:
            item.number = next(self._numbers)
        if item.since_s is None:
            item.since_s = now_s
        if item.tag is None:
            flow = level.flows.get(item.client)
            item.tag = level.virtual = level.virtual if flow is None else max(flow.tag, level.virtual)
        level.flows.clear()

    def reage(self, ageing_s: float) -> None:
        """Let waiting be worth one priority every ``ageing_s``, for those who wait as well."""
        if ageing_s == self.ageing_s:
            return
        self.ageing_s = ageing_s
        for level in self._levels.values():
            for *_, flow in level.order:
                head = flow.items[0]
                assert head.since_s is not None
                flow.key = _key(level.priority, ageing_s, head, head.since_s, flow.tag, flow)
            level.order = sorted(flow.key for *_, flow in level.order if flow.key is not None)

    def start(self, item: T, now_s: float) -> None:
        """Take ``item`` out because it is served: its client is charged, once. Raises KeyError."""
        level, flow = self._levels[item.priority], self._flow(item)
        if flow is None or item not in flow.items:
            raise KeyError(item)
        if item.tag is None:
            item.tag = flow.tag
            flow.tag += item.cost_s / item.weight
            level.virtual = max(level.virtual, item.tag)
        self._take(level, flow, item, now_s)
        if not level.size:
            level.flows.clear()  # nobody waits: nothing is owed

    def remove(self, item: T, now_s: float) -> bool:
        """Take ``item`` out unserved; whether it was there."""
        flow = self._flow(item)
        if flow is None or item not in flow.items:
            return False
        self._take(self._levels[item.priority], flow, item, now_s)
        return True

    def order(self, now_s: float) -> Iterator[T]:
        """All that wait, in the order in which they would be started if it were now.

        The line may be changed meanwhile: what is iterated over is the line as it was.
        """
        levels: list[_Preview] = [
            _Preview(level, self.ageing_s, now_s) for level in self._levels.values() if level.size
        ]
        while levels:
            first = min(levels, key=_Preview.rank)
            yield first.next()  # type: ignore[misc]  # what was added are items of T
            if not first.heap:
                levels.remove(first)

    def position(self, item: T, now_s: float) -> int:
        """1 for the one that is next, 0 for one that does not wait."""
        return next((place for place, one in enumerate(self.order(now_s), 1) if one is item), 0)

    @property
    def work_s(self) -> float:
        """What all that wait cost."""
        return sum(level.work_s for level in self._levels.values() if level.size)

    def before(self, item: T) -> tuple[int, float]:
        """About how many go before ``item``, which waits, and what they cost; without going through them all.

        All that are more urgent, and of each client of the same priority as many as ``item``'s own has up to
        it, for they take turns.
        """
        level, mine = self._levels[item.priority], self._flow(item)
        assert mine is not None
        urgent = [one for one in self._levels.values() if one.priority > item.priority and one.size]
        count, work_s = sum(one.size for one in urgent), sum(one.work_s for one in urgent)
        turns = mine.items.index(item)
        for *_, flow in level.order:
            size = min(len(flow.items), turns if flow is mine else turns + 1)
            count += size
            work_s += flow.work_s * size / len(flow.items)
        return count, work_s

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(priority)
        return level

    def _flow(self, item: T) -> _Flow | None:
        level = self._levels.get(item.priority)
        return level.flows.get(item.client) if level is not None else None

    def _take(self, level: _Level, flow: _Flow, item: T, now_s: float) -> None:
        was_head = flow.items[0] is item
        flow.items.remove(item)
        level.size -= 1
        self._size -= 1
        level.work_s -= item.cost_s
        flow.work_s -= item.cost_s
        if was_head:
            self._came_up(level, flow, now_s)

    def _came_up(self, level: _Level, flow: _Flow, now_s: float) -> None:
        """The head of ``flow`` is another one than before."""
        if flow.key is not None and flow.age is not None:
            del level.order[bisect_left(level.order, flow.key)]
            del level.ages[bisect_left(level.ages, flow.age)]
            flow.key = flow.age = None
        if flow.items:
            head = flow.items[0]
            if head.since_s is None:
                head.since_s = now_s
            flow.key = _key(level.priority, self.ageing_s, head, head.since_s, flow.tag, flow)
            flow.age = (head.since_s, head.number, flow)
            insort(level.order, flow.key)
            insort(level.ages, flow.age)


class _Preview:
    """What one level would start next, again and again, if all that is before had been started now."""

    def __init__(self, level: _Level, ageing_s: float, now_s: float) -> None:
        self.heap = list(level.order)  # sorted, hence a heap
        self._ages = [(since_s, number) for since_s, number, _ in level.ages]
        self._priority, self._ageing_s, self._now_s = level.priority, ageing_s, now_s
        self._rest: dict[_Flow, Iterator[Item]] = {}  # of flows whose head is gone
        self._head: dict[_Flow, Item] = {}  # who came up instead
        self._tag: dict[_Flow, float] = {}
        self._gone: set[int] = set()

    def rank(self) -> tuple[int, int]:
        """The lowest is next: the oldest head speaks for its level."""
        while self._ages and self._ages[0][1] in self._gone:
            heappop(self._ages)
        oldest_s = self._ages[0][0] if self._ages else self._now_s
        return int(oldest_s // self._ageing_s) - self._priority, -self._priority

    def next(self) -> Item:
        """Who would be started; call it while ``heap`` has somebody."""
        flow = self.heap[0][3]
        if flow not in self._rest:  # a copy: the line may change while it is looked at
            self._rest[flow] = iter(tuple(flow.items))
            self._head[flow], self._tag[flow] = next(self._rest[flow]), flow.tag
        item, following = self._head[flow], next(self._rest[flow], None)
        self._gone.add(item.number)
        if following is None:
            heappop(self.heap)
            return item
        self._head[flow] = following
        if item.tag is None:
            self._tag[flow] += item.cost_s / item.weight
        since_s = self._now_s
        if following.since_s is not None:  # it was a head before the one before it came back
            since_s = following.since_s
            heappush(self._ages, (since_s, following.number))
        key = _key(self._priority, self._ageing_s, following, since_s, self._tag[flow], flow)
        heapreplace(self.heap, key)
        return item


def _arrival(item: Item) -> tuple[float, int]:
    return item.arrived_s, item.number


def _key(priority: int, ageing_s: float, head: Item, since_s: float, tag: float, flow: _Flow) -> _Key:
    group = int(since_s // ((HIGHEST + 1 - priority) * ageing_s))
    return group, tag if head.tag is None else head.tag, head.number, flow
