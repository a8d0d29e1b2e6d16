"""The end of every request, whichever way it ended: taken off its node, learned from, written down.

What is learned and written down comes behind the answer, in the loop's next turn: no client waits for it, and
what has ended in one turn is told together, one listener after the other, each with its code and data in the
processor's caches (that halves what the journal costs under load).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from mitmproxy import http

from proxy_addon import defects, record
from proxy_addon.dispatch import Dispatch
from proxy_addon.fleet.crowd import Company
from proxy_addon.fleet.node import Node
from proxy_addon.record import Record

Lesson = Callable[[], None]


class Epilogue:
    """Last addon of the chain. ``observers`` (journal, metrics) see each finished record once, soon."""

    def __init__(
        self,
        dispatch: Dispatch,
        suspect: Callable[[Node], None],
        observers: Sequence[Callable[[Record], None]],
    ) -> None:
        self.dispatch = dispatch
        self.suspect = suspect
        self.observers = observers
        self._ended: list[tuple[Record, Lesson | None]] = []  # and not told yet

    def response(self, flow: http.HTTPFlow) -> None:
        """The answer is complete."""
        rec = record.of(flow)
        if rec is not None and rec.ended_s is None:
            status = flow.response.status_code if flow.response else 0
            self._end(
                flow, rec, rec.outcome or ("ok" if status < 400 else "refused" if status < 500 else "failed")
            )

    def error(self, flow: http.HTTPFlow) -> None:
        """The answer broke off, on either side."""
        rec = record.of(flow)
        if rec is not None and rec.ended_s is None:
            self._end(flow, rec, rec.outcome or "client_left")

    def let_go(self, flow: http.HTTPFlow) -> None:
        """Over, and a defect kept it from being told."""
        rec = record.of(flow)
        if rec is not None:
            rec.ended_s = rec.ended_s or self.dispatch.now()
            _drop_body(rec)
            self.dispatch.release(flow, rec, "failed")

    def _end(self, flow: http.HTTPFlow, rec: Record, outcome: str) -> None:
        now_s = self.dispatch.now()
        rec.ended_s, rec.outcome = now_s, outcome
        _drop_body(rec)
        rec.status = flow.response.status_code if flow.response is not None else None
        flight, node = rec.flight, rec.node
        company = flight.company(now_s) if flight is not None else Company()
        detail = flow.error.msg if flow.error is not None and outcome != "ok" else ""
        self.dispatch.release(flow, rec, outcome, detail)
        lesson: Lesson | None = None
        if node is not None and flight is not None:
            if outcome == "ok":
                node.health.succeeded()
            elif outcome == "cut":
                node.health.failed(now_s, detail or "broke off in mid-answer")
                self.suspect(node)
            if outcome == "ok" and rec.ask is not None and rec.sent_s is not None:
                lesson = partial(
                    self.dispatch.speeds.observe,
                    node,
                    rec.ask,
                    rec.stats,
                    (rec.first_byte_s or now_s) - rec.sent_s,
                    now_s - rec.sent_s,
                    company.sequences,
                    now_s,
                    runners=company.runners,
                    cached_tokens=flight.cached_tokens,
                    lone=flight.lone,
                )
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._tell)
        self._ended.append((rec, lesson))

    def _tell(self) -> None:
        ended, self._ended = self._ended, []
        for rec, lesson in ended:
            if lesson is not None:
                try:
                    lesson()
                except Exception as defect:  # noqa: BLE001 - what others keep must not depend on it
                    defects.report(defect, "observer", rec.id)
        for observer in self.observers:
            for rec, _ in ended:
                try:
                    observer(rec)
                except Exception as defect:  # noqa: BLE001 - nor on each other
                    defects.report(defect, "observer", rec.id)


def _drop_body(rec: Record) -> None:
    """Its body is not needed any more: whoever carries the flow forgets it now."""
    if rec.held is not None:
        rec.held.let_go()
