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

from proxy_addon import errors, record
from proxy_addon.access import HOPS_HEADER
from proxy_addon.admission import limits
from proxy_addon.admission.admission import Admission
from proxy_addon.admission.limits import Refused
from proxy_addon.admission.passing import where
from proxy_addon.admission.waiter import NOTHING, Waiter
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.health import BASE_EJECTION_S
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node, names
from proxy_addon.heads import put
from proxy_addon.one_server.upstream import nobody
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import decide
from proxy_addon.placement.rules import Rules
from proxy_addon.placement.runner import runs_under, slots_of
from proxy_addon.record import Attempt, Record
from proxy_addon.retry import backoff_s
from proxy_addon.settings import Settings

MANY_EXCLUDED = 6  #: an error sentence names so many nodes, the journal has them all
LONGEST_EJECTION_S = 2 * BASE_EJECTION_S  #: that is waited for: the second one in a row is


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
            if self._comes_back(rec):
                if not rec.decisions or rec.decisions[-1].node is not None:
                    rec.decisions.append(decision)  # once: it may be looked at again many times
                await self._change(rec)
                if rec.left:
                    return None
                rec.excluded = dict(rec.hopeless)
                continue
            rec.decisions.append(decision)
            if self.fleet.nobody_stores(rec.ask.key) and self.fleet.up(self.now()):
                return self._answer(rec, 404, _not_found(rec.ask))
            rec.rounds += 1
            if not self._awaits(rec, decision) and (
                rec.rounds >= self.terms(rec).retry.rounds or self._hopeless(rec)
            ):
                return self._answer(rec, 503, self._nobody(rec, decision), {"retry-after": "2"})
            retry = self.terms(rec).retry
            await _unless_left(
                rec, backoff_s(rec.rounds, retry.backoff_s, retry.backoff_max_s, random.random())
            )
            await _unless_left(rec, self._until_one_returns_s(rec))
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

    def _awaits(self, rec: Record, decision: Decision) -> bool:
        """Whether it is worth to wait on for a coordinator; the time runs from the first such moment."""
        if not any(name not in rec.hopeless for name in decision.awaits):
            return False
        if rec.awaits_until_s is None:
            rec.awaits_until_s = self.now() + self.terms(rec).shard.wait_s
        return self.now() < rec.awaits_until_s

    def _comes_back(self, rec: Record) -> bool:
        """Whether a node is only kept from taking ``rec`` by how few it is given while it comes back."""
        assert rec.ask is not None and rec.waiter is not None
        now_s, key = self.now(), rec.ask.key
        return now_s - rec.waiter.arrived_s < self.settings.admission.max_wait_s and any(
            node.up(now_s)
            and key in node.models
            and node.name not in rec.hopeless
            and not node.health.admits(node.own_flights)
            for node in self.fleet
        )

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

    def _until_one_returns_s(self, rec: Record) -> float:
        """How long to wait on for an ejection to end: rounds that nobody can be tried in show nothing.

        Only for a node that answers its polls and whose failures do not go on and on.
        """
        assert rec.ask is not None
        now_s, key = self.now(), rec.ask.key
        able = [
            node
            for node in self.fleet
            if key in node.models and node.poll_error is None and node.name not in rec.hopeless
        ]
        left_s = min((node.health.ejected_until_s - now_s for node in able), default=0.0)
        return left_s if left_s <= LONGEST_EJECTION_S else 0.0

    def _hopeless(self, rec: Record) -> bool:
        """Whether another round could only repeat what this one has shown."""
        assert rec.ask is not None
        live = self.fleet.holders(rec.ask.key, self.now())
        return bool(live) and all(node.name in rec.hopeless for node in live)

    def _answer(
        self, rec: Record, status: int, message: str, headers: dict[str, str] | None = None
    ) -> http.Response:
        return errors.response(rec.protocol, status, message, request_id=rec.id, headers=headers)

    def _nobody(self, rec: Record, decision: Decision) -> str:
        if not self.fleet.up(self.now()):
            return nobody(self.fleet)
        tried = {attempt.node for attempt in rec.attempts}  # what is wrong with them is what matters
        out = sorted(decision.candidates, key=lambda each: each.node not in tried)
        why = [f"{each.node}: {each.excluded}" for each in out if each.excluded]
        if not why:
            return f"no node can serve this request ({names(self.fleet)}): {decision.reason}"
        more = f"; and {len(why) - MANY_EXCLUDED} more" if len(why) > MANY_EXCLUDED else ""
        return "no node can serve this request: " + "; ".join(why[:MANY_EXCLUDED]) + more


def _not_found(ask: Ask) -> str:
    """Ollama's own words (``server/routes.go``), which clients match; they differ between endpoints."""
    if ask.task is Task.EMBED:
        return f'model "{ask.model}" not found, try pulling it first'
    return f"model '{ask.model}' not found"


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
