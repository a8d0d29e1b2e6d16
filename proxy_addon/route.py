"""The request hook of inference: ask → decide → rewrite the host.

Everything that one node answers alone comes through here; the fleet-wide endpoints are ``one_server``'s.
"""

from __future__ import annotations

from collections.abc import Awaitable

from mitmproxy import http

from agent.ollama.names import is_cloud
from proxy_addon import record
from proxy_addon.ask import Ask
from proxy_addon.dispatch import Dispatch
from proxy_addon.endpoints import Handling
from proxy_addon.one_server.addon import OneServer
from proxy_addon.placement.decision import Decision
from proxy_addon.record import Record
from proxy_addon.retry import Budget


class Route:
    """Sends a routed request to the node that is expected to finish it first."""

    def __init__(self, dispatch: Dispatch, one_server: OneServer, budget: Budget) -> None:
        self.dispatch = dispatch
        self.one_server = one_server
        self.budget = budget

    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """Place the request, or answer it where no node can serve it."""
        rec = record.of(flow)
        if rec is None or flow.response is not None or rec.ask is None:
            return None
        ask, dispatch = rec.ask, self.dispatch
        if ask.endpoint.handling is not Handling.ROUTE:
            return None
        now_s = dispatch.now()
        self.budget.request(now_s)
        if ask.unload or is_cloud(ask.model):
            return self._answered_elsewhere(flow, ask)
        ask.body = {}  # nothing of a prompt is kept while it waits
        ask.settle(dispatch.fleet.usual(ask.key))
        dispatch.speeds.demand.note(ask, now_s)
        looked, placed = dispatch.at_once(flow, rec)
        return None if placed else self._placed(flow, rec, looked)

    async def _placed(self, flow: http.HTTPFlow, rec: Record, looked: Decision | None) -> None:
        flow.response = await self.dispatch.place(flow, rec, looked)

    async def _answered_elsewhere(self, flow: http.HTTPFlow, ask: Ask) -> None:
        await (self.one_server.unload(flow) if ask.unload else self.one_server.pin(flow))
        ask.body = {}
