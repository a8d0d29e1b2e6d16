"""Give a request to a node: wait for one, count it in flight there, point the flow at it.

``route.py`` calls it for a new request, ``failover.py`` for one whose node failed; both end either with the
flow placed or with the answer that the client must get. Who waits is ``admission/``'s affair, where to go
``placement/``'s.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, MutableMapping

from mitmproxy import http
from mitmproxy.connection import Client

from proxy_addon import errors, record, unplaced
from proxy_addon.access import HOPS_HEADER
from proxy_addon.admission import limits
from proxy_addon.admission.admission import Admission
from proxy_addon.admission.limits import Refused
from proxy_addon.admission.passing import where
from proxy_addon.admission.waiter import NOTHING, Waiter
from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.heads import put
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.runner import runs_under, slots_of
from proxy_addon.record import Attempt, Record
from proxy_addon.retry import backoff_s
from proxy_addon.settings import Settings


class Dispatch:
    """Places requests on nodes of ``fleet``."""

    def __init__(
        self,
        fleet: Fleet,
        speeds: Speeds,
        settings: Settings,
        now: Callable[[], float],
        stamp: Callable[[MutableMapping[str, str]], None],
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.fleet = fleet
        self.speeds = speeds
        self.settings = settings
        self.rules = Rules.of(settings)
        self.now = now
        self.stamp = stamp
        self.on_refused = on_refused  #: called with the reason
        self.closing = False  #: the end has come: nothing is placed any more
        self.admission = Admission(fleet, settings.admission, self._decide, self._start, now)
        self._asked: dict[Waiter, tuple[http.HTTPFlow, Record]] = {}  # those that admission has now
        self.in_flight: dict[Node, set[http.HTTPFlow]] = {}
        self._changed: asyncio.Event | None = None  #: set, and dropped, when a node may have become free
        fleet.on_freed.append(self._stir)
        fleet.on_lost.append(lambda _node, _reason: self._stir())
        fleet.on_seen.append(lambda ask: speeds.demand.note(ask, now()))

    def reconfigure(self, settings: Settings) -> None:
        """Place requests that come from now on by ``settings``; the line goes by them at once."""
        self.settings, self.rules = settings, Rules.of(settings)
        self.admission.reconfigure(settings.admission)

    def terms(self, rec: Record) -> Settings:
        """The settings that ``rec`` is placed by."""
        return rec.settings or self.settings

    def _rules(self, settings: Settings) -> Rules:
        return self.rules if settings is self.settings else Rules.of(settings)

    def at_once(self, flow: http.HTTPFlow, rec: Record) -> tuple[Decision | None, bool]:
        """Point ``flow`` at the best node if that can be done without a wait, and say whether it was done.

        If it was not, :meth:`place` wants to have the decision, if there is one.
        """
        assert rec.ask is not None
        if self.closing or rec.ask.load_only:
            return None, False
        waiter = self._waiter(rec)
        self._asked[waiter] = flow, rec
        try:
            return self.admission.at_once(waiter)
        finally:
            del self._asked[waiter]

    async def place(
        self, flow: http.HTTPFlow, rec: Record, looked: Decision | None = None
    ) -> http.Response | None:
        """Point ``flow`` at the best node; None once that is done, else the client's answer.

        It waits in line until a node has time for it. Nodes in ``rec.excluded`` are not tried. When nobody is
        left, it waits (exponential back-off) and starts over without those whose failure will not pass, up to
        ``retry.rounds`` rounds, or for ``shard.wait_s`` where only a coordinator could serve that may come
        back. No round is counted while the only node that could serve it is coming back and given little.
        Returns None at once, unplaced, when the client has left.
        """
        assert rec.ask is not None
        while True:
            try:
                if self.closing:
                    raise limits.ending()
                decision = await self._admit(flow, rec, looked)
            except Refused as refused:
                return self.refuse(rec, refused)
            looked = None
            if decision is None or decision.node is not None:
                return None
            if unplaced.comes_back(rec, self.fleet, self.now(), self.settings.admission.max_wait_s):
                if not rec.decisions or rec.decisions[-1].node is not None:
                    rec.decisions.append(decision)  # once: it may be looked at again many times
                await self._change(rec)
                if rec.left:
                    return None
                rec.excluded = dict(rec.hopeless)
                continue
            rec.decisions.append(decision)
            if self.fleet.nobody_stores(rec.ask.key) and self.fleet.up(self.now()):
                return self._answer(rec, 404, unplaced.not_found(rec.ask))
            rec.rounds += 1
            terms = self.terms(rec)
            retry = terms.retry
            if not unplaced.awaits(rec, decision, self.now(), terms.shard.wait_s) and (
                rec.rounds >= retry.rounds or unplaced.hopeless(rec, self.fleet, self.now())
            ):
                why = unplaced.why(rec, decision, self.fleet, self.now())
                return self._answer(rec, 503, why, {"retry-after": "2"})
            await _unless_left(
                rec, backoff_s(rec.rounds, retry.backoff_s, retry.backoff_max_s, random.random())
            )
            await _unless_left(rec, unplaced.until_one_returns_s(rec, self.fleet, self.now()))
            if rec.left:
                return None
            rec.excluded = dict(rec.hopeless)

    def refuse(self, rec: Record, refused: Refused) -> http.Response:
        """The answer to a request that is beyond a limit."""
        rec.outcome = "refused"
        self.on_refused(refused.reason)
        return self._answer(rec, refused.status, refused.message, refused.headers)

    async def _admit(self, flow: http.HTTPFlow, rec: Record, looked: Decision | None) -> Decision | None:
        """Wait in line, unless the client leaves; a request to load a model goes where it can at once."""
        waiter = self._waiter(rec)
        self._asked[waiter] = flow, rec

        def left() -> None:
            self.admission.withdraw(waiter)

        rec.on_left.append(left)
        try:
            if waiter.ask.load_only:
                decision = self._decide(waiter, NOTHING)
                if decision.node is not None:
                    self._start(waiter, decision)
                return decision
            return await self.admission.admit(waiter, looked)
        finally:
            del self._asked[waiter]
            if left in rec.on_left:
                rec.on_left.remove(left)
            if waiter.position is not None:
                rec.queued_s, rec.queue_position = waiter.waited_s, waiter.position
                rec.expected_wait_s = waiter.expected_wait_s

    def _waiter(self, rec: Record) -> Waiter:
        """The same one each time, so that a request that comes back stands where it stood."""
        ask = rec.ask
        assert ask is not None
        if rec.waiter is None:
            rec.waiter = Waiter(
                id=rec.id,
                ask=ask,
                client=ask.client,
                priority=ask.priority,
                weight=ask.weight,
                arrived_s=self.now(),
            )
        rec.waiter.excluded = rec.excluded
        return rec.waiter

    def _decide(self, waiter: Waiter, closed: Mapping[str, str]) -> Decision:
        excluded = {**waiter.excluded, **closed} if closed else waiter.excluded
        asked = self._asked.get(waiter)
        return self._choose(waiter.ask, self.terms(asked[1]) if asked else self.settings, excluded)

    def _choose(self, ask: Ask, terms: Settings, excluded: Mapping[str, str]) -> Decision:
        rules, policy = self._rules(terms), terms.placement
        return decide(ask, self.fleet, self.speeds, self.now(), policy, excluded, rules)

    def _start(self, waiter: Waiter, decision: Decision) -> None:
        assert decision.node is not None
        flow, rec = self._asked[waiter]
        rec.decisions.append(decision)
        self.send(flow, rec, self.fleet.nodes[decision.node], decision)

    def elsewhere(self, rec: Record, node: Node, reason: str) -> bool:
        """Whether another node than ``node`` could take ``rec``."""
        if rec.ask is None:
            return False
        excluded = {**rec.excluded, node.name: reason}
        return self._choose(rec.ask, self.terms(rec), excluded).node is not None

    def at_once_elsewhere(self, rec: Record, node: Node) -> Decision | None:
        """The decision by which ``rec`` could start now on another node than ``node``, if there is one."""
        closed = {node.name: "has it already"}
        ahead_s = self.settings.admission.ahead_s
        decision, ready = where(self._waiter(rec), self.fleet, self._decide, ahead_s, closed)
        return decision if ready else None

    def send(self, flow: http.HTTPFlow, rec: Record, node: Node, decision: Decision | None = None) -> None:
        """Point ``flow`` at ``node`` and count it in flight there."""
        now_s = self.now()
        if rec.ask is not None and decision is not None and decision.chosen is not None:
            key, loads = rec.ask.key, decision.chosen.terms.get("load_s", 0.0) > 0
            rec.flight = node.take(
                rec.ask,
                now_s,
                decision.expected_s,
                load=loads,
                service_s=decision.service_s,
                slots=slots_of(node, rec.ask, node.models[rec.ask.key]),
                evicts=decision.evicts,
                need_bytes=decision.need_bytes,
            )
            node.loaded_with[key] = runs_under(node.loaded_with.get(key), rec.ask.reload_key, loads)
        name = node.name
        headers = {"host": name}  # a loopback Ollama checks it
        if hops := rec.headers.get(HOPS_HEADER):
            headers[HOPS_HEADER] = hops
        self.stamp(headers)
        put(flow.request.headers, headers)
        data = flow.request.data
        data.host, data.port, data.scheme, data.authority = node.host, node.port, b"http", b""
        rec.node = node
        rec.placed = True
        rec.sent_s = now_s
        rec.attempts.append(Attempt(name, now_s))
        self.in_flight.setdefault(node, set()).add(flow)

    def release(self, flow: http.HTTPFlow, rec: Record, outcome: str, detail: str = "") -> None:
        """The attempt is over: take the request off its node, once, and say how it ended."""
        if rec.flight is not None:
            rec.flight.drop((rec.stats.output_tokens or 0) if rec.stats else 0, self.now())
            rec.flight = None
        if rec.node is not None:
            flows = self.in_flight.get(rec.node)
            if flows is not None:
                flows.discard(flow)
                if not flows:
                    del self.in_flight[rec.node]
        if rec.attempts and rec.attempts[-1].outcome is None:
            attempt = rec.attempts[-1]
            attempt.ended_s, attempt.outcome, attempt.detail = self.now(), outcome, detail

    def sent_by(self, client: Client) -> Record | None:
        """What is in flight for ``client``; for rare cases, as it looks through all."""
        flows = (flow for flows in self.in_flight.values() for flow in flows)
        return next((record.of(flow) for flow in flows if flow.client_conn is client), None)

    async def _change(self, rec: Record) -> None:
        """Wait until a node is free or lost, or the client leaves, or it has waited too long."""
        assert rec.waiter is not None
        until_s = rec.waiter.arrived_s + self.settings.admission.max_wait_s
        rec.on_left.append(self._stir)
        try:
            async with asyncio.timeout(until_s - self.now()):
                if self._changed is None:
                    self._changed = asyncio.Event()
                await self._changed.wait()
        except TimeoutError:
            return
        finally:
            if self._stir in rec.on_left:
                rec.on_left.remove(self._stir)

    def _stir(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _answer(
        self, rec: Record, status: int, message: str, headers: dict[str, str] | None = None
    ) -> http.Response:
        return errors.response(rec.protocol, status, message, request_id=rec.id, headers=headers)


async def _unless_left(rec: Record, delay_s: float) -> None:
    """Wait ``delay_s``, or until the client leaves."""
    if rec.left or delay_s <= 0:
        return
    left = asyncio.Event()
    rec.on_left.append(left.set)
    try:
        async with asyncio.timeout(delay_s):
            await left.wait()
    except TimeoutError:
        return
    finally:
        if left.set in rec.on_left:
            rec.on_left.remove(left.set)
