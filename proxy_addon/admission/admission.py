"""The shell around the line: whoever waits is given a node once one has a slot free that serves it well.

A node is chosen when a request is started, not when it arrives (late binding). Passes (passing.py) follow
events: an arrival, a slot set free, news of a node. A timer only stands in for what is expected to change and
may do so without an event.

Independent of mitmproxy: ``decide`` says where a request would go now, ``start`` sends it there and takes the
flight, both at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

from proxy_addon.admission import limits
from proxy_addon.admission.courtesy import Courtesy
from proxy_addon.admission.line import Line
from proxy_addon.admission.passing import Decide, Pass, where
from proxy_addon.admission.waiter import Kind, Standing, Waiter
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.decision import Decision
from proxy_addon.settings import Admission as Settings

LEAST_WAKE_S = 0.02  #: of the timer, so that an estimate which is always about to pass cannot spin
NO_ESTIMATE_S = 1.0  #: what a client is charged where the policy expects nothing: all requests are alike


class Admission:
    """Lets requests to the nodes of ``fleet``, in the order of the line.

    ``decide(waiter, closed)`` decides at this moment, without the waiter's excluded nodes and ``closed``;
    ``start(waiter, decision)`` sends it.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        decide: Decide,
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
        self._kinds: Counter[Kind] = Counter()
        self._pass_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._courtesy = Courtesy(fleet.waits_elsewhere)
        fleet.on_seen.append(lambda ask: self._courtesy.seen(ask.key))
        fleet.on_freed.append(self.wake)
        fleet.on_news.append(lambda _node: self.wake())
        fleet.on_lost.append(lambda _node, _reason: self.wake())

    def at_once(self, waiter: Waiter) -> tuple[Decision, bool]:
        """Start ``waiter`` if it need not wait; returns the decision, and whether it was started."""
        decision, ready = where(waiter, self.fleet, self._decide, self.settings.ahead_s)
        if decision.node is None:
            return decision, False
        if waiter.tag is None:
            waiter.cost_s = decision.service_s or NO_ESTIMATE_S
        now_s = self._now()
        if not ready or len(self.line) or self._leaves_until_s(waiter, now_s) is not None:
            return decision, False
        self.line.pass_by(waiter, now_s)
        self._start(waiter, decision)
        self._courtesy.started(waiter.ask.key)
        return decision, True

    async def admit(self, waiter: Waiter, looked: Decision | None = None) -> Decision | None:
        """Return once ``waiter`` is started, with the decision; None if it was withdrawn before.

        A decision without a node says that nobody may serve it as things are; it was not started then.
        ``looked`` is that of :meth:`at_once`, where that has just not started it. Raises Refused.
        """
        decision, started = self.at_once(waiter) if looked is None else (looked, False)
        if decision.node is None or started:
            return decision
        if self.closing:
            raise limits.ending()
        if not waiter.number and len(self.line) >= self.settings.max_queue:
            raise limits.queue_full(self.settings.max_queue, self._last_wait_s())
        return await self._wait(waiter)

    def reconfigure(self, settings: Settings) -> None:
        """Go by ``settings`` from now on, also for those who wait."""
        self.settings = settings
        self.line.reage(settings.ageing_s)
        self.wake()

    def wake(self) -> None:
        """Something has changed: look soon who can be started."""
        if len(self.line) and not self._pass_due:
            self._pass_due = True
            asyncio.get_running_loop().call_soon(self._pass)

    def withdraw(self, waiter: Waiter, outcome: Decision | Exception | None = None) -> None:
        """Take ``waiter`` out of the line, unserved: nobody wants the answer any more, unless told else."""
        if self._leave(waiter):
            waiter.tell(outcome)

    def close(self) -> None:
        """The end has come: who waits is refused now, who comes back is started at once or refused."""
        self.closing = True
        for waiter in list(self.line.order(self._now())):
            self.withdraw(waiter, limits.ending())

    def standings(self) -> Iterator[Standing]:
        """All that wait, in order, with what is to be expected: all work before it, over all slots."""
        now_s, wait_s, before_s = self._now(), self._wait_s(0.0), 0.0
        per_second = self._wait_s(1.0) - wait_s
        for position, waiter in enumerate(self.line.order(now_s), 1):
            yield Standing(waiter, position, waiter.so_far_s(now_s), wait_s + before_s * per_second)
            before_s += waiter.cost_s

    def _wait_s(self, before_s: float) -> float:
        """What to expect behind so much work: it and all that is in flight, over all slots."""
        slots = sum(node.parallel for node in self.fleet.up(self._now()))
        return (before_s + sum(node.work_s for node in self.fleet)) / max(1, slots)

    async def _wait(self, waiter: Waiter) -> Decision | None:
        loop, now_s = asyncio.get_running_loop(), self._now()
        answer = waiter.answer = loop.create_future()
        waiter.joined_s = now_s
        self.line.add(waiter, now_s)
        self._count(waiter, 1)
        if waiter.position is None:
            count, work_s = self.line.before(waiter)
            waiter.position, waiter.expected_wait_s = count + 1, self._wait_s(work_s)
        limit = loop.call_later(self.settings.max_wait_s - waiter.waited_s, self._too_long, waiter)
        self.wake()
        try:
            decision: Decision | None = await answer
            return decision
        finally:
            limit.cancel()
            self._leave(waiter)  # where it was cancelled

    def _too_long(self, waiter: Waiter) -> None:
        self.withdraw(waiter, limits.waited_too_long(self.settings.max_wait_s, self._last_wait_s()))

    def _last_wait_s(self) -> float:
        """What one more is to expect."""
        return self._wait_s(self.line.work_s)

    def _leave(self, waiter: Waiter) -> bool:
        """Take ``waiter`` out of the line unserved; whether it was there."""
        now_s = self._now()
        if not self.line.remove(waiter, now_s):
            return False
        self._left(waiter, now_s)
        self.wake()  # its place on a node may be another's
        return True

    def _left(self, waiter: Waiter, now_s: float) -> None:
        if waiter.joined_s is None:
            return
        waiter.left(now_s)
        self._count(waiter, -1)

    def _leaves_until_s(self, waiter: Waiter, now_s: float) -> float | None:
        """Until when ``waiter`` leaves its slot to those who wait in another proxy's line; None: it goes."""
        return self._courtesy.until_s(waiter.ask.key, waiter.priority, now_s)

    def _count(self, waiter: Waiter, by: int) -> None:
        """Keep count of who waits, and let other proxies know."""
        self._kinds[waiter.kind] += by
        if not self._kinds[waiter.kind]:
            del self._kinds[waiter.kind]
        line: dict[str, int] = {}
        for key, _, priority in self._kinds:
            line[key] = max(priority, line.get(key, 0))
        self.fleet.waits(line)

    def _go(self, waiter: Waiter, decision: Decision, now_s: float) -> None:
        self.line.start(waiter, now_s)
        self._left(waiter, now_s)
        self._start(waiter, decision)
        self._courtesy.started(waiter.ask.key)
        waiter.tell(decision)

    def _pass(self) -> None:
        self._pass_due = False
        current = Pass(self.fleet, self._decide, self.settings.ahead_s, now_s := self._now())
        current.go_through(self.line.order(now_s), self._kinds.keys())
        due_s = current.due_s
        for waiter, decision in current.chosen:
            left_until_s = self._leaves_until_s(waiter, now_s)
            if left_until_s is not None:
                due_s = min(due_s, left_until_s)
                continue
            try:
                self._go(waiter, decision, now_s)
            except Exception as error:  # noqa: BLE001 - told to whoever asked; the others go on
                waiter.tell(error)
        for waiter, nobody in current.nobody:
            self.withdraw(waiter, nobody)
        for waiter, fault in current.failed:
            self.withdraw(waiter, fault)
        self._wake_at(min([due_s, *self._changes(now_s)]), now_s)

    def _wake_at(self, due_s: float, now_s: float) -> None:
        """Look again at ``due_s``, in case no event tells that what was expected has happened."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if len(self.line) and due_s < float("inf"):
            delay_s = max(due_s - now_s, LEAST_WAKE_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.wake)

    def _changes(self, now_s: float) -> Iterator[float]:
        """When nodes may be given work again that may not now."""
        for node in self.fleet:
            for until_s in (node.health.ejected_until_s, node.full_until_s, *node.unfit_until_s.values()):
                if until_s > now_s:
                    yield until_s
