"""What to do about a failed attempt: classify, tell the fleet, choose another node or give the answer."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import http

from agent.ollama.names import is_cloud
from proxy_addon import errors, record
from proxy_addon.attempt import CONNECT_CANCELLED, Failure
from proxy_addon.dispatch import Dispatch
from proxy_addon.fleet.node import Node
from proxy_addon.record import Record
from proxy_addon.retry import Budget, Meaning, classify, may_retry

FULL_S = 1.0  #: how long a node that said 503 is taken at its word
UNFIT_S = 60.0  #: how long a model that did not fit a node is not offered to it again

#: Failures that another round over the same nodes would only repeat.
HOPELESS = frozenset({Meaning.STALE, Meaning.TOO_SMALL, Meaning.REFUSED})
#: Failures after which the request itself is under suspicion: it may be what kills the runners. All nodes may
#: have failed at one moment by chance, so that each gets a second try, but no more, and not in a large fleet.
BREAKING = frozenset({Meaning.DIED, Meaning.BROKEN})
MAX_BROKEN_ON_A_NODE = 2
MAX_BROKEN = 6
#: Failures that count against a node's health, and whether one is enough to eject it.
UNHEALTHY = {Meaning.UNREACHABLE: True, Meaning.DIED: False, Meaning.BROKEN: False, Meaning.REFUSED: True}


class Failover:
    """Answers ``sollol_failure``."""

    def __init__(
        self,
        dispatch: Dispatch,
        budget: Budget,
        suspect: Callable[[Node], None],
        on_retry: Callable[[str], None],
    ) -> None:
        self.dispatch = dispatch
        self.budget = budget
        self.suspect = suspect
        self.on_retry = on_retry

    async def sollol_failure(self, failure: Failure) -> None:
        """Set ``failure.retry`` after pointing the flow elsewhere, or ``failure.response``.

        Neither is set for an answer of the node's own that the client must see as it is.
        """
        flow, rec = failure.flow, record.of(failure.flow)
        if rec is None or rec.endpoint is None or rec.node is None:
            return
        node, now_s = rec.node, self.dispatch.now()
        detail = rec.abort_reason or one_line(failure.detail)
        if failure.detail == CONNECT_CANCELLED:
            detail = f"no connection within {self.dispatch.settings.timeouts.connect_s:g} s"
        rec.abort_reason = None
        if errors.OWN_FAULT in failure.detail:  # a hook of ours: the node is not to blame
            rec.outcome = "failed"
            self.dispatch.release(flow, rec, "failed", detail)
            failure.response = errors.internal(rec.protocol, rec.id)
            return
        meaning = classify(failure.phase, failure.status, failure.detail, rec.endpoint)
        if rec.moving:
            meaning, rec.moving = Meaning.MOVED, False
        self.dispatch.release(flow, rec, meaning.value, detail)
        idle_close = failure.reused and meaning is Meaning.DIED and node.name not in rec.idle_closed
        if idle_close:
            rec.idle_closed.add(node.name)  # it closed a kept connection: no fault, and worth one more try
        else:
            self._tell_fleet(node, rec, meaning, detail, now_s)
        if meaning is Meaning.ANSWER:
            return
        if meaning in BREAKING and not idle_close:
            rec.broken[node.name] += 1
        if rec.broken.total() >= MAX_BROKEN:
            others = f"so did {rec.broken.total() - 1} attempts before it"
            failure.response = self._give_up(failure, rec, node, f"{detail}; {others}")
            return
        only_here = rec.ask is None or is_cloud(rec.ask.model)  # the signed-in node has no stand-in
        if only_here or not may_retry(meaning, failure.phase, rec.endpoint, failure.replayable):
            failure.response = self._give_up(failure, rec, node, detail)
            return
        if not idle_close:
            rec.excluded[node.name] = f"{meaning.value}: {detail}" if detail else meaning.value
            if meaning in HOPELESS or rec.broken[node.name] >= MAX_BROKEN_ON_A_NODE:
                rec.hopeless[node.name] = rec.excluded[node.name]
        # The first failover of a request is free: a node that dies with a hundred requests must not turn
        # the ninety-first into an error. What a sick fleet could amplify are the tries after that.
        # What was moved had not failed.
        failed = sum(attempt.outcome != Meaning.MOVED for attempt in rec.attempts)
        if meaning is not Meaning.MOVED and failed > 1 and not self.budget.take(now_s):
            failure.response = self._give_up(failure, rec, node, f"{detail}; the retry budget is spent")
            return
        self.on_retry(meaning.value)
        answer = await self.dispatch.place(flow, rec)
        if answer is None:
            failure.retry = rec.placed and not rec.left
        elif failure.phase == "status":
            return  # the node's own words say more than ours
        else:
            failure.response = answer

    def _tell_fleet(self, node: Node, rec: Record, meaning: Meaning, detail: str, now_s: float) -> None:
        if meaning in UNHEALTHY:
            node.health.failed(now_s, detail, fatal=UNHEALTHY[meaning])
            self.dispatch.speeds.observe_failure(node.name, now_s - (rec.sent_s or now_s), now_s)
            self.suspect(node)
        elif meaning is Meaning.FULL:
            node.full_until_s = now_s + FULL_S
        elif meaning is Meaning.STALE:
            # Its list decides, not this answer: the name may be one that only this endpoint does not take.
            self.suspect(node)
        elif rec.ask is not None and meaning is Meaning.TOO_SMALL and not node.coordinator:
            # Of a coordinator its report tells, which knows of every node that comes or goes.
            node.unfit_until_s[rec.ask.key] = now_s + UNFIT_S

    def _give_up(self, failure: Failure, rec: Record, node: Node, detail: str) -> http.Response | None:
        if failure.phase == "status":
            return None
        rec.outcome = "failed"
        message = f"node {node.name} failed: {detail or failure.phase}"
        return errors.response(rec.protocol, 503, message, request_id=rec.id, headers={"retry-after": "2"})


def one_line(text: str, limit: int = 200) -> str:
    """``text`` fit for a log line: one line, bounded."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
