"""Give a request to a node: decide, count it in flight there, point the flow at it.

``route.py`` calls it for a new request, ``failover.py`` for one whose node failed; both end either with the
flow placed or with the answer that the client must get.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, MutableMapping

from mitmproxy import http

from proxy_addon import errors
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node, names
from proxy_addon.one_server.upstream import nobody
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.diversion import Diversion
from proxy_addon.placement.policies import decide
from proxy_addon.placement.runner import slots_of
from proxy_addon.record import Attempt, Record
from proxy_addon.retry import backoff_s
from proxy_addon.settings import Settings

MANY_EXCLUDED = 6  #: an error sentence names so many nodes, the journal has them all


class Dispatch:
    """Places requests on nodes of ``fleet``."""

    def __init__(
        self,
        fleet: Fleet,
        speeds: Speeds,
        settings: Settings,
        now: Callable[[], float],
        stamp: Callable[[MutableMapping[str, str]], None],
    ) -> None:
        self.fleet = fleet
        self.speeds = speeds
        self.settings = settings
        self.rules = Diversion(settings.shard.models, settings.shard.min_gpu_share)
        self.now = now
        self.stamp = stamp
        self.closing = False  #: the end has come: nothing is placed any more
        self.in_flight: dict[Node, set[http.HTTPFlow]] = {}

    async def place(self, flow: http.HTTPFlow, rec: Record) -> http.Response | None:
        """Point ``flow`` at the best node; None once that is done, else the client's answer.

        Nodes in ``rec.excluded`` are not tried. When nobody is left, it waits (exponential back-off) and
        starts over without those whose failure will not pass, up to ``retry.rounds`` rounds, or for
        ``shard.wait_s`` where only a coordinator could serve that may come back. Returns None at once,
        unplaced, when the client has left.
        """
        assert rec.ask is not None
        while True:
            if self.closing:
                return self._answer(rec, 503, "SOLLOL is shutting down", {"retry-after": "2"})
            decision = self.decide(rec)
            if decision.node is not None:
                self.send(flow, rec, self.fleet.nodes[decision.node], decision)
                return None
            if self.fleet.nobody_stores(rec.ask.key) and self.fleet.up(self.now()):
                return self._answer(rec, 404, _not_found(rec.ask))
            rec.rounds += 1
            if not self._awaits(rec, decision) and (
                rec.rounds >= self.settings.retry.rounds or self._hopeless(rec)
            ):
                return self._answer(rec, 503, self._nobody(decision), {"retry-after": "2"})
            retry = self.settings.retry
            await _unless_left(
                rec, backoff_s(rec.rounds, retry.backoff_s, retry.backoff_max_s, random.random())
            )
            if rec.left:
                return None
            rec.excluded = dict(rec.hopeless)

    def decide(self, rec: Record) -> Decision:
        """Decide where ``rec`` goes next, and keep the decision in it."""
        assert rec.ask is not None
        decision = decide(
            rec.ask,
            self.fleet,
            self.speeds,
            self.now(),
            policy=self.settings.placement,
            excluded=rec.excluded,
            rules=self.rules,
        )
        rec.decisions.append(decision)
        return decision

    def elsewhere(self, rec: Record, node: Node, reason: str) -> bool:
        """Whether another node than ``node`` could take ``rec``."""
        if rec.ask is None:
            return False
        excluded = {**rec.excluded, node.name: reason}
        policy = self.settings.placement
        decision = decide(rec.ask, self.fleet, self.speeds, self.now(), policy, excluded, self.rules)
        return decision.node is not None

    def send(self, flow: http.HTTPFlow, rec: Record, node: Node, decision: Decision | None = None) -> None:
        """Point ``flow`` at ``node`` and count it in flight there."""
        now_s = self.now()
        if rec.ask is not None and decision is not None and decision.chosen is not None:
            rec.flight = node.take(
                rec.ask,
                now_s,
                decision.expected_s,
                load=decision.chosen.terms.get("load_s", 0.0) > 0,
                service_s=decision.service_s,
                slots=slots_of(node, rec.ask, node.models[rec.ask.key]),
            )
            node.loaded_with[rec.ask.key] = rec.ask.reload_key
        point_at(flow, node)
        self.stamp(flow.request.headers)
        rec.node = node
        rec.placed = True
        rec.sent_s = now_s
        rec.attempts.append(Attempt(node.name, now_s))
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

    def _awaits(self, rec: Record, decision: Decision) -> bool:
        """Whether it is worth to wait on for a coordinator; the time runs from the first such moment."""
        if not any(name not in rec.hopeless for name in decision.awaits):
            return False
        if rec.awaits_until_s is None:
            rec.awaits_until_s = self.now() + self.settings.shard.wait_s
        return self.now() < rec.awaits_until_s

    def _hopeless(self, rec: Record) -> bool:
        """Whether another round could only repeat what this one has shown."""
        assert rec.ask is not None
        live = self.fleet.holders(rec.ask.key, self.now())
        return bool(live) and all(node.name in rec.hopeless for node in live)

    def _answer(
        self, rec: Record, status: int, message: str, headers: dict[str, str] | None = None
    ) -> http.Response:
        return errors.response(rec.protocol, status, message, request_id=rec.id, headers=headers)

    def _nobody(self, decision: Decision) -> str:
        if not self.fleet.up(self.now()):
            return nobody(self.fleet)
        why = [f"{c.node}: {c.excluded}" for c in decision.candidates if c.excluded]
        if not why:
            return f"no node can serve this request ({names(self.fleet)}): {decision.reason}"
        more = f"; and {len(why) - MANY_EXCLUDED} more" if len(why) > MANY_EXCLUDED else ""
        return "no node can serve this request: " + "; ".join(why[:MANY_EXCLUDED]) + more


def _not_found(ask: Ask) -> str:
    """Ollama's own words (``server/routes.go``), which clients match; they differ between endpoints."""
    if ask.task is Task.EMBED:
        return f'model "{ask.model}" not found, try pulling it first'
    return f"model '{ask.model}' not found"


def point_at(flow: http.HTTPFlow, node: Node) -> None:
    """Rewrite the upstream address and Host of ``flow`` to ``node``: a loopback Ollama checks its Host."""
    data = flow.request.data
    data.host, data.port, data.scheme, data.authority = node.host, node.port, b"http", b""
    flow.request.headers["host"] = node.name


async def _unless_left(rec: Record, delay_s: float) -> None:
    """Wait ``delay_s``, or until the client leaves."""
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
