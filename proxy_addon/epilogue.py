"""The end of every request, whichever way it ended: taken off its node, learned from, written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mitmproxy import http

from proxy_addon import defects, record
from proxy_addon.dispatch import Dispatch
from proxy_addon.fleet.crowd import Company
from proxy_addon.fleet.node import Node
from proxy_addon.record import Record


class Epilogue:
    """Last addon of the chain. ``observers`` (journal, metrics) see each finished record once."""

    def __init__(
        self,
        dispatch: Dispatch,
        suspect: Callable[[Node], None],
        observers: Sequence[Callable[[Record], None]],
    ) -> None:
        self.dispatch = dispatch
        self.suspect = suspect
        self.observers = observers

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
        if node is not None and flight is not None:
            if outcome == "ok":
                node.health.succeeded()
            elif outcome == "cut":
                node.health.failed(now_s, detail or "broke off in mid-answer")
                self.suspect(node)
            if outcome == "ok" and rec.ask is not None and rec.sent_s is not None:
                first_byte_s = (rec.first_byte_s or now_s) - rec.sent_s
                try:
                    self.dispatch.speeds.observe(
                        node,
                        rec.ask,
                        rec.stats,
                        first_byte_s,
                        now_s - rec.sent_s,
                        company.sequences,
                        now_s,
                        runners=company.runners,
                        cached_tokens=flight.cached_tokens,
                        lone=flight.lone,
                    )
                except Exception as defect:  # noqa: BLE001 - what others keep must not depend on it
                    defects.report(defect, "observer", rec.id)
        for observer in self.observers:
            try:
                observer(rec)
            except Exception as defect:  # noqa: BLE001 - nor on each other
                defects.report(defect, "observer", rec.id)


def _drop_body(rec: Record) -> None:
    """Its body is not needed any more: whoever carries the flow forgets it now."""
    if rec.held is not None:
        rec.held.let_go()
