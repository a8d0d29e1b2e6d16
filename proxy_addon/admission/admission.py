"""The shell around the line: whoever waits is given a node once one has a slot free that serves it well.

A node is chosen when a request is started, not when it arrives (late binding). A *pass* goes through the line
in its order and asks for a decision for each: a request whose node has a slot free (or will within
``ahead_s``) is started; one that had better wait for a busy node keeps its place there for the rest of the
pass, so that nobody behind it counts on the same slot. Passes follow events (an arrival, a slot set free,
news of a node), never a clock; a timer only stands in for expectations that pass without an event.

Independent of mitmproxy: ``decide`` says where a request would go now, ``start`` sends it there and takes the
flight, both at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from proxy_addon.admission import limits
from proxy_addon.admission.line import Item, Line
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.fleet.slots import to_offer
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.runner import slots_for
from proxy_addon.settings import Admission as Settings

LOOKS = 32  #: decisions in one pass: at about 50 µs each it stays below 2 ms
LEAST_WAKE_S = 0.02  #: of the timer, so that an estimate which is always about to pass cannot spin
NO_ESTIMATE_S = 1.0  #: what a client is charged where the policy expects nothing: all requests are alike
NOTHING: Mapping[str, str] = MappingProxyType({})
FULL = "has no slot free"
KEPT_FREE = "is kept free for a request before this one, which must load its model there"

_Kind = tuple[str, Task]  #: requests that use the same slots: model and task


@dataclass(eq=False, slots=True, kw_only=True)
class Waiter(Item):
    """A request before the fleet. Kept over failures, so that it comes back to where it stood."""

    id: str
    ask: Ask
    excluded: Mapping[str, str] = NOTHING  #: nodes that it was tried on, and why they are out
    position: int | None = None  #: in the line when it joined; None: it has not waited
    expected_wait_s: float = 0.0  #: as it was then
    waited_s: float = 0.0  #: so far, all times together
    joined_s: float | None = None  #: in the line since then
    answer: asyncio.Future[Decision | None] | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a waiter stands now."""

    waiter: Waiter
    position: int
    waited_s: float
    expected_wait_s: float


@dataclass(slots=True)
class _Pass:
    """What one pass knows beyond the fleet."""

    now_s: float
    held: list[Flight] = field(default_factory=list)  #: places of those that were looked at so far
    chosen: list[tuple[Waiter, Decision]] = field(default_factory=list)  #: those that are started
    closed: dict[str, str] = field(default_factory=dict)  #: nodes that nobody may be given any more
    shut: set[_Kind] = field(default_factory=set)  #: of these no more slot is free anywhere
    due_s: float = float("inf")  #: the earliest moment at which a place kept should be free


class Admission:
    """Lets requests to the nodes of ``fleet``, in the order of the line.

    ``decide(waiter, closed)`` decides at this moment, without the waiter's excluded nodes and ``closed``;
    ``start(waiter, decision)`` sends it.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        decide: Callable[[Waiter, Mapping[str, str]], Decision],
        start: Callable[[Waiter, Decision], None],
        now: Callable[[], float],
    ) -> None:
        self.fleet = fleet
        self.settings = settings
        self.line: Line[Waiter] = Line(settings.ageing_s)
        self.closing = False
        self._decide = decide
        self._start = start
        self._now = now
        self._kinds: Counter[_Kind] = Counter()
        self._pass_due = False
        self._timer: asyncio.TimerHandle | None = None
        fleet.on_freed.append(self.wake)
        fleet.on_news.append(lambda _node: self.wake())
        fleet.on_lost.append(lambda _node, _reason: self.wake())

    async def admit(self, waiter: Waiter) -> Decision | None:
        """Return once ``waiter`` is started, with the decision; None if it was withdrawn before.

        A decision without a node says that nobody may serve it as things are; it was not started then.
        Raises Refused.
        """
        decision = self._decide(waiter, NOTHING)
        if decision.node is None:
            return decision
        if waiter.tag is None:
            waiter.cost_s = decision.service_s or NO_ESTIMATE_S
        if not len(self.line):
            now_s = self._now()
            decision, free = self._free(waiter, decision, NOTHING)
            if free:
                self.line.add(waiter, now_s)
                self._go(waiter, decision, now_s)
                return decision
        self._refuse_if_over(waiter)
        return await self._wait(waiter)

    def wake(self) -> None:
        """Something has changed: look soon who can be started."""
        if len(self.line) and not self._pass_due:
            self._pass_due = True
            asyncio.get_running_loop().call_soon(self._run)

    def withdraw(self, waiter: Waiter) -> None:
        """Nobody wants the answer any more."""
        if self._leave(waiter):
            _tell(waiter, None)

    def close(self) -> None:
        """The end has come: who waits is refused now, who comes back is started at once or refused."""
        self.closing = True
        for waiter in list(self.line.order(self._now())):
            self._leave(waiter)
            _fail(waiter, limits.ending())

    def standings(self) -> Iterator[Standing]:
        """All that wait, in order, with what is to be expected."""
        now_s, slots = self._now(), max(1, sum(node.parallel for node in self.fleet.up(self._now())))
        ahead_s = sum(node.work_s for node in self.fleet)
        for position, waiter in enumerate(self.line.order(now_s), 1):
            waited_s = waiter.waited_s + now_s - (now_s if waiter.joined_s is None else waiter.joined_s)
            yield Standing(waiter, position, waited_s, ahead_s / slots)
            ahead_s += waiter.cost_s

    # -- waiting --------------------------------------------------------------------------------------

    def _refuse_if_over(self, waiter: Waiter) -> None:
        if self.closing:
            raise limits.ending()
        if not waiter.number and len(self.line) >= self.settings.max_queue:
            raise limits.queue_full(self.settings.max_queue, self._last_wait_s())

    async def _wait(self, waiter: Waiter) -> Decision | None:
        loop, now_s = asyncio.get_running_loop(), self._now()
        answer = waiter.answer = loop.create_future()
        waiter.joined_s = now_s
        self.line.add(waiter, now_s)
        self._kinds[_kind(waiter)] += 1
        if waiter.position is None:
            self._look_up(waiter)
        limit = loop.call_later(self.settings.max_wait_s - waiter.waited_s, self._too_long, waiter)
        self.wake()
        try:
            decision: Decision | None = await answer
            return decision
        finally:
            limit.cancel()
            self._leave(waiter)  # where it was cancelled

    def _look_up(self, waiter: Waiter) -> None:
        for standing in self.standings():
            if standing.waiter is waiter:
                waiter.position, waiter.expected_wait_s = standing.position, standing.expected_wait_s
                return

    def _too_long(self, waiter: Waiter) -> None:
        if self._leave(waiter):
            _fail(waiter, limits.waited_too_long(self.settings.max_wait_s, self._last_wait_s()))

    def _last_wait_s(self) -> float:
        """What a request that joined now would have to wait."""
        slots = max(1, sum(node.parallel for node in self.fleet.up(self._now())))
        work_s = sum(node.work_s for node in self.fleet) + sum(w.cost_s for w in self.line.order(self._now()))
        return work_s / slots

    def _leave(self, waiter: Waiter) -> bool:
        """Take ``waiter`` out of the line unserved; whether it was there."""
        if not self.line.remove(waiter, self._now()):
            return False
        self._left(waiter, self._now())
        self.wake()  # its place on a node may be another's
        return True

    def _left(self, waiter: Waiter, now_s: float) -> None:
        if waiter.joined_s is None:
            return
        waiter.waited_s += now_s - waiter.joined_s
        waiter.joined_s = None
        kind = _kind(waiter)
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]

    # -- the pass -------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._pass_due = False
        current = _Pass(self._now())
        try:
            self._go_through(current)
        finally:
            for flight in current.held:
                flight.cancel()
        for waiter, decision in current.chosen:  # only now: places held are nobody else's affair
            self._answer(waiter, self._go, decision, current.now_s)
        self._wake_at(current)

    def _go_through(self, current: _Pass) -> None:
        looks = 0
        for waiter in self.line.order(current.now_s):
            if looks == LOOKS or len(current.shut) >= len(self._kinds):
                return
            kind = _kind(waiter)
            if kind in current.shut:
                continue
            if not self._may_be_free(waiter.ask, current.now_s):
                current.shut.add(kind)
                continue
            looks += 1
            self._answer(waiter, self._look_at, current)

    def _answer[*A](self, waiter: Waiter, do: Callable[[Waiter, *A], None], *with_: *A) -> None:
        """Do something for ``waiter``: a fault in it is that request's, and must not keep others waiting."""
        try:
            do(waiter, *with_)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._leave(waiter)
            _fail(waiter, error)

    def _look_at(self, waiter: Waiter, current: _Pass) -> None:
        decision, free = self._free(waiter, self._decide(waiter, current.closed), current.closed)
        if decision.node is not None:
            if free or self._on_trial(waiter, decision, current.now_s):
                current.chosen.append((waiter, decision))
            else:
                self._wait_for(waiter, decision, current)
            self._hold(waiter, decision, current)
            return
        if current.closed:
            decision = self._decide(waiter, NOTHING)
        if decision.node is None:
            self._leave(waiter)
            _tell(waiter, decision)

    def _free(self, waiter: Waiter, decision: Decision, closed: Mapping[str, str]) -> tuple[Decision, bool]:
        """Where ``waiter`` should go, and whether it can go there now.

        A policy that does not count seconds would choose a full node while others are idle: it is asked among
        those that are not.
        """
        first = decision
        while decision.node is not None:
            if decision.wait_s <= self.settings.ahead_s:
                return decision, True
            if decision.chosen is None or "wait_s" in decision.chosen.terms:
                break
            full = [row.node for row in decision.rows if row.wait_s > self.settings.ahead_s]
            closed = {**closed, **dict.fromkeys((*full, decision.node), FULL)}
            decision = self._decide(waiter, closed)
        return first, False

    def _go(self, waiter: Waiter, decision: Decision, now_s: float) -> None:
        self.line.start(waiter, now_s)
        self._left(waiter, now_s)
        self._start(waiter, decision)
        _tell(waiter, decision)

    def _hold(self, waiter: Waiter, decision: Decision, current: _Pass) -> None:
        """Let nobody behind ``waiter`` count on what it gets or waits for."""
        assert decision.node is not None
        loads = _term(decision, "load_s") > 0
        node, expected_s = self.fleet.nodes[decision.node], decision.expected_s
        current.held.append(node.reserve(waiter.ask, current.now_s, expected_s, loads, decision.service_s))

    def _wait_for(self, waiter: Waiter, decision: Decision, current: _Pass) -> None:
        """``waiter`` waits on, and the node that it waits for is kept free for it if it must load there.

        Where it must load its model, others would keep the node busy with theirs for ever. They may for as
        long as the waiter has waited less than the load costs; then the node is kept free for it. So nobody
        waits more than twice what it must (the ski rental problem), and models do not take turns needlessly.
        """
        assert decision.node is not None
        node = self.fleet.nodes[decision.node]
        load_s = _term(decision, "load_s")
        waited_s = waiter.waited_s + current.now_s - (waiter.joined_s or current.now_s)
        if (
            load_s > 0
            and not _is_loading(node, waiter.ask)
            and waited_s >= load_s + _term(decision, "evict_s")
        ):
            current.closed[node.name] = KEPT_FREE
        current.due_s = min(current.due_s, current.now_s + decision.wait_s - self.settings.ahead_s)

    def _on_trial(self, waiter: Waiter, decision: Decision, now_s: float) -> bool:
        """Whether ``waiter`` shows how many its node serves at a time, by being one more than is known of."""
        assert decision.node is not None
        node = self.fleet.nodes[decision.node]
        in_use = node.in_use.get(waiter.ask.key, 0)
        return (
            in_use >= node.parallel
            and not _term(decision, "load_s")
            and in_use < _slots(node, waiter.ask, now_s)
        )

    def _may_be_free(self, ask: Ask, now_s: float) -> bool:
        """Whether a decision for ``ask`` could start it now. Quick; wrong only to the side of yes."""
        able = False
        for node in self.fleet:
            row = node.models.get(ask.key)
            if row is None or not node.up(now_s):
                continue
            able = True
            if node.in_use.get(ask.key, 0) < _slots(node, ask, now_s):
                return True
            soon_s = now_s + self.settings.ahead_s
            if any(
                now_s <= flight.started_s + flight.expected_s <= soon_s
                for flight in node.flights
                if flight.ask.key == ask.key
            ):
                return True
        return not able  # nobody may serve it: it must be told so

    def _wake_at(self, current: _Pass) -> None:
        """Look again when something that was expected should have happened, in case no event tells."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not len(self.line):
            return
        due_s = min([current.due_s, *(self._changes(current.now_s))])
        if due_s < float("inf"):
            delay_s = max(due_s - current.now_s, LEAST_WAKE_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.wake)

    def _changes(self, now_s: float) -> Iterator[float]:
        """When nodes may be given work again that may not now."""
        for node in self.fleet:
            for until_s in (node.health.ejected_until_s, node.full_until_s, *node.unfit_until_s.values()):
                if until_s > now_s:
                    yield until_s


def _kind(waiter: Waiter) -> _Kind:
    return waiter.ask.key, waiter.ask.task


def _slots(node: Node, ask: Ask, now_s: float) -> int:
    """How many requests like ``ask`` may be on ``node``: its runner's slots, and one more on trial."""
    if ask.task is Task.EMBED or slots_for(2, node.models[ask.key]) == 1:
        return 1
    return to_offer(node, now_s)


def _term(decision: Decision, name: str) -> float:
    """A part of what is expected on the chosen node, whatever the policy makes of it."""
    row = decision.row
    return float(getattr(row, name)) if row is not None else 0.0


def _is_loading(node: Node, ask: Ask) -> bool:
    return any(f.load and f.first_byte_s is None and f.ask.key == ask.key for f in node.flights)


def _tell(waiter: Waiter, decision: Decision | None) -> None:
    if waiter.answer is not None and not waiter.answer.done():
        waiter.answer.set_result(decision)


def _fail(waiter: Waiter, error: Exception) -> None:
    if waiter.answer is not None and not waiter.answer.done():
        waiter.answer.set_exception(error)
