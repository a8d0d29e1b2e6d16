"""Take back what a node has not begun to answer and what would now be done far sooner elsewhere.

Polls bring what is known of nodes once a second, and that one is late shows by time alone. So who waits for
a first byte is looked at once a second, a bounded number at a time, those first that were looked at longest
ago; while nobody does, nothing runs. One at a time is moved, so that the next look sees it where it went.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mitmproxy import http

from agent.ollama.names import is_cloud
from proxy_addon import record
from proxy_addon.attempt import Failure
from proxy_addon.dispatch import Dispatch
from proxy_addon.placement.second_thoughts import elsewhere_s, left_here, worth_moving
from proxy_addon.record import Record
from proxy_addon.retry import Meaning, may_retry

EVERY_S = 1.0  #: between two looks: as often as polls bring news
YOUNG_S = 1.0  #: of what was sent so lately the decision knew all that is known now
LOOKS = 8  #: requests at a time, at about 0.15 ms each; decisions among a thousand equal nodes take some ms
MOVES = 1  #: of one request: where it goes then it stays, so that it cannot wander


class SecondThoughts:
    """Moves unanswered requests. ``take_back(flow, reason)`` breaks an attempt off; False if it cannot."""

    def __init__(self, dispatch: Dispatch, take_back: Callable[[http.HTTPFlow, str], bool]) -> None:
        self.dispatch = dispatch
        self._take_back = take_back
        self._moving: http.HTTPFlow | None = None
        self._timer: asyncio.TimerHandle | None = None

    def request(self, flow: http.HTTPFlow) -> None:
        """A request was sent, or answered at once."""
        self._look_in(EVERY_S)

    def sollol_failure(self, failure: Failure) -> None:
        """An attempt has failed, or was taken back; by now it is placed anew."""
        self.let_go(failure.flow)
        self._look_in(EVERY_S)

    def response(self, flow: http.HTTPFlow) -> None:
        """The answer was quicker."""
        self.let_go(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        """The client has left."""
        self.let_go(flow)

    def let_go(self, flow: http.HTTPFlow) -> None:
        """It is where it stays, or over."""
        if flow is self._moving:
            self._moving = None
            self._look_in(0.0)  # others may wait for the same reason

    def _look_in(self, delay_s: float) -> None:
        # Of other policies nobody expects that they send a request where it ends first.
        active = self.dispatch.settings.placement == "finish_time"
        if active and self._timer is None and self._moving is None and self.dispatch.in_flight:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = self.dispatch.now()
        unanswered = [
            (flow, rec)
            for flows in self.dispatch.in_flight.values()
            for flow in flows
            if (rec := record.of(flow)) is not None and rec.first_byte_s is None
        ]
        if not unanswered or self.dispatch.closing:
            return
        # While others wait in the proxy's line, a slot that is free is for them.
        flow = None if len(self.dispatch.admission.line) else self._first_to_move(unanswered, now_s)
        if flow is None:
            self._look_in(EVERY_S)

    def _first_to_move(
        self, unanswered: list[tuple[http.HTTPFlow, Record]], now_s: float
    ) -> http.HTTPFlow | None:
        """Take back the first that is worth it; None if there is none."""
        waiting = [(flow, rec) for flow, rec in unanswered if _movable(flow, rec, now_s)]
        waiting.sort(key=lambda each: (each[1].looked_s, each[1].waiter.number if each[1].waiter else 0))
        for flow, rec in waiting[:LOOKS]:
            rec.looked_s = now_s
            reason = self._better(rec, now_s)
            if reason is not None and self._take_back(flow, reason):
                rec.moving, self._moving = True, flow
                return flow
        return None

    def _better(self, rec: Record, now_s: float) -> str | None:
        """Why ``rec`` should be moved; None if it should not."""
        dispatch, flight = self.dispatch, rec.flight
        then = rec.decisions[-1].row if rec.decisions else None
        if flight is None or then is None:
            return None
        left = left_here(flight, then, dispatch.fleet, dispatch.speeds, now_s)
        if left is None or not worth_moving(left.seconds, 0.0):
            return None
        decision = dispatch.at_once_elsewhere(rec, flight.node)
        if decision is None or not worth_moving(left.seconds, other_s := elsewhere_s(decision)):
            return None
        return (
            f"{flight.node.name} {left.why}: {left.seconds:.0f} s more there, "
            f"{other_s:.0f} s on {decision.node}"
        )


def _movable(flow: http.HTTPFlow, rec: Record, now_s: float) -> bool:
    """Whether ``rec`` waits for its first byte and may be sent to another node."""
    flight, ask = rec.flight, rec.ask
    return (
        flight is not None
        and rec.first_byte_s is None
        and now_s - flight.started_s >= YOUNG_S
        and ask is not None
        and not (ask.load_only or is_cloud(ask.model) or flight.node.coordinator)
        and rec.endpoint is not None
        and may_retry(Meaning.MOVED, "reset", rec.endpoint, replayable=not flow.request.stream)
        and sum(attempt.outcome == Meaning.MOVED for attempt in rec.attempts) < MOVES
    )
