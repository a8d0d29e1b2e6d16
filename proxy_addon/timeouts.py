"""Time limits of our own for one attempt: connect, first byte, idle; and the end of what a lost node holds.

mitmproxy has one inactivity limit for everything, which would kill a model that loads for minutes
(``tcp_timeout``, lifted by the launcher). A limit here ends the *connection*; the stream then sees a broken
attempt and fails over like after any other. Timers are one per attempt and phase, never one per piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from mitmproxy import http
from mitmproxy.connection import Server
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from proxy_addon import defects, record, wire
from proxy_addon.attempt import Failure
from proxy_addon.deadlines import Deadlines
from proxy_addon.dispatch import Dispatch
from proxy_addon.endpoints import Handling
from proxy_addon.fleet.node import Node
from proxy_addon.record import Record
from proxy_addon.settings import Settings
from proxy_addon.settings import Timeouts as Limits

ESTIMATE_ROOM = 3.0  #: a prefill or decode may take so many times what was expected
LOST_IDLE_S = 10.0  #: a stream of a node that answers no polls may be silent for so long
LOST_SILENT_S = 60.0  #: and what has no limit of its own, before its first byte
UNLIMITED = (Handling.STICKY, Handling.PIN)  #: a create or a push may work silently for as long as it takes


def first_byte_limit_s(limits: Limits, rec: Record) -> float:
    """How long the attempt of ``rec`` may stay without an answer.

    Ollama sends nothing, not even the head, before the first token; an answer that is not streamed comes
    whole at its end. A load adds its own limit; the queue and the work that the decision expected are added
    too, the latter with room for an estimate that is wrong by a factor.
    """
    streamed = rec.ask is None or rec.ask.stream
    limit_s = limits.first_byte_s if streamed else limits.whole_answer_s
    if rec.flight is None:
        return max(limit_s, limits.load_s)
    chosen = rec.decisions[-1].chosen if rec.decisions else None
    terms = chosen.terms if chosen else {}
    if rec.flight.load or (rec.node is not None and rec.node.coordinator):
        # A coordinator that loses a backend plans and loads anew without a word.
        limit_s += max(limits.load_s, ESTIMATE_ROOM * terms.get("load_s", 0.0))
    work_s = terms.get("prefill_s", 0.0) + (0.0 if streamed else terms.get("decode_s", 0.0))
    return limit_s + terms.get("wait_s", 0.0) + ESTIMATE_ROOM * work_s


class Timeouts:
    """Arms and disarms the limits, and moves what a lost node has not begun to answer."""

    def __init__(self, dispatch: Dispatch, limits: Limits) -> None:
        self.dispatch = dispatch
        self.limits = limits
        self._connecting: dict[str, asyncio.TimerHandle] = {}  # by id of the server connection
        self._due = Deadlines()  # by id of the flow
        dispatch.fleet.on_lost.append(self._node_lost)

    def reconfigure(self, settings: Settings) -> None:
        """Other limits for requests that come from now on."""
        self.limits = settings.timeouts

    def _limits(self, rec: Record) -> Limits:
        return self.limits if rec.settings is None else rec.settings.timeouts

    # -- connect --------------------------------------------------------------------------------------

    def server_connect(self, data: ServerConnectionHookData) -> None:
        """Limit the connect; refuse any address that is not a node's (hooks fail open, this does not)."""
        address = data.server.address
        if address is None or self.dispatch.fleet.find(address[0], address[1]) is None:
            data.server.error = f"{address} is not a node of this fleet"
            return
        loop = asyncio.get_running_loop()
        self._connecting[data.server.id] = loop.call_later(
            self.limits.connect_s, wire.cancel_connect, data.client, data.server
        )

    def server_connected(self, data: ServerConnectionHookData) -> None:
        """Connected in time."""
        self._connect_over(data.server)

    def server_connect_error(self, data: ServerConnectionHookData) -> None:
        """Failed on its own or was cancelled by us."""
        self._connect_over(data.server)

    def _connect_over(self, server: Server) -> None:
        timer = self._connecting.pop(server.id, None)
        if timer is not None:
            timer.cancel()

    # -- first byte, idle -----------------------------------------------------------------------------

    def request(self, flow: http.HTTPFlow) -> None:
        """The request was placed: the first byte is due."""
        if flow.response is None:
            self._arm_first_byte(flow)

    def sollol_failure(self, failure: Failure) -> None:
        """An attempt failed; if it is tried elsewhere, that attempt has its own limit."""
        if failure.retry:
            self._arm_first_byte(failure.flow)
        else:
            self._disarm(failure.flow)

    def _arm_first_byte(self, flow: http.HTTPFlow) -> None:
        rec = record.of(flow)
        if rec is None or not rec.placed or rec.endpoint is None or rec.endpoint.handling in UNLIMITED:
            self._disarm(flow)
            return
        limit_s = first_byte_limit_s(self._limits(rec), rec)
        self._arm(flow, limit_s, self._first_byte_due, limit_s)

    def _first_byte_due(self, flow: http.HTTPFlow, limit_s: float) -> None:
        rec = record.of(flow)
        if rec is not None and rec.first_byte_s is None:
            self.abort(flow, f"no answer within {limit_s:g} s")

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """The answer has begun: from now on only silence counts, the node's or the client's."""
        rec = record.of(flow)
        if rec is not None and rec.placed and flow.live:
            rec.last_byte_s = self.dispatch.now()
            self._arm(flow, self._limits(rec).idle_s, self._idle)
        else:
            self._disarm(flow)

    def _idle(self, flow: http.HTTPFlow) -> None:
        rec = record.of(flow)
        if rec is None:
            return
        lost = rec.node is not None and rec.node.poll_error is not None
        idle_s = self._limits(rec).idle_s
        limit_s = min(LOST_IDLE_S, idle_s) if lost else idle_s
        silent_s = self.dispatch.now() - (rec.last_byte_s or 0.0)
        if silent_s >= limit_s and wire.stalls(flow):
            wire.hang_up(flow)  # nothing came because nothing could go: the node is not to blame
        elif silent_s >= limit_s:
            self.abort(flow, f"nothing came for {silent_s:.0f} s")
        else:
            self._arm(flow, limit_s - silent_s, self._idle)

    def response(self, flow: http.HTTPFlow) -> None:
        """Over, well."""
        self._disarm(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        """Over, badly."""
        self._disarm(flow)

    def let_go(self, flow: http.HTTPFlow) -> None:
        """Over, and it could not be said."""
        self._disarm(flow)

    def _arm[*Args](
        self, flow: http.HTTPFlow, delay_s: float, due: Callable[[http.HTTPFlow, *Args], None], *args: *Args
    ) -> None:
        self._due.set(flow.id, delay_s, partial(_due, due, flow, *args))

    def _disarm(self, flow: http.HTTPFlow) -> None:
        self._due.clear(flow.id)

    # -- ending an attempt ----------------------------------------------------------------------------

    def _node_lost(self, node: Node, reason: str) -> None:
        """What waits on a node that stopped answering moves now, instead of at its own limit.

        A node may only be too busy to answer polls: a stream that still flows goes on, and so does a request
        that no other node could take.
        """
        for flow in list(self.dispatch.in_flight.get(node, ())):
            rec = record.of(flow)
            if rec is None:
                continue
            if rec.first_byte_s is not None:
                self._idle(flow)
            elif self.dispatch.elsewhere(rec, node, reason):
                self.abort(flow, reason)
            elif rec.endpoint is not None and rec.endpoint.handling in UNLIMITED:
                self._arm(flow, LOST_SILENT_S, self._still_lost, f"{reason}, and nothing came since")

    def _still_lost(self, flow: http.HTTPFlow, reason: str) -> None:
        rec = record.of(flow)
        if rec is not None and rec.node is not None and rec.node.poll_error is not None:
            self.abort(flow, reason)

    def abort_all(self, reason: str) -> None:
        """End every attempt under way, place none of them anew, and refuse who waits for a place."""
        self.dispatch.closing = True
        self.dispatch.admission.close()
        for flows in list(self.dispatch.in_flight.values()):
            for flow in list(flows):
                self.abort(flow, reason)

    def abort(self, flow: http.HTTPFlow, reason: str) -> None:
        """Break the upstream connection of ``flow``; its stream then fails over, or ends with an error."""
        rec = record.of(flow)
        if rec is not None:
            rec.abort_reason = reason
        wire.break_off(flow)

    def take_back(self, flow: http.HTTPFlow, reason: str) -> bool:
        """As :meth:`abort`, but harmless where there is no connection yet; whether there was one."""
        rec = record.of(flow)
        if rec is None or not flow.server_conn.connected or not wire.break_off(flow):
            return False
        rec.abort_reason = reason
        return True


def _due[*Args](due: Callable[[http.HTTPFlow, *Args], None], flow: http.HTTPFlow, *args: *Args) -> None:
    """A limit is reached. Where what is to be done fails itself, the attempt is not left without a limit."""
    try:
        due(flow, *args)
    except Exception as defect:  # noqa: BLE001 - the outermost boundary of a timer
        rec = record.of(flow)
        defects.report(defect, "timer", rec.id if rec is not None else "")
        wire.break_off(flow)
