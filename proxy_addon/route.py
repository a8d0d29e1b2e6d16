"""The request hook of inference: ask → decide → rewrite the host.

Everything that one node answers alone comes through here; the fleet-wide endpoints are ``one_server``'s.
"""

from __future__ import annotations

from mitmproxy import http

from agent.ollama.names import is_cloud
from proxy_addon import record
from proxy_addon.dispatch import Dispatch
from proxy_addon.endpoints import Handling
from proxy_addon.one_server.addon import OneServer
from proxy_addon.retry import Budget


class Route:
    """Sends a routed request to the node that is expected to finish it first."""

    def __init__(self, dispatch: Dispatch, one_server: OneServer, budget: Budget) -> None:
        self.dispatch = dispatch
        self.one_server = one_server
        self.budget = budget

    async def request(self, flow: http.HTTPFlow) -> None:
        """Place the request, or answer it where no node can serve it."""
        rec = record.of(flow)
        if rec is None or flow.response is not None or rec.ask is None:
            return
        if rec.ask.endpoint.handling is not Handling.ROUTE:
            return
        self.budget.request(self.dispatch.now())
        if rec.ask.unload:
            await self.one_server.unload(flow)
        elif is_cloud(rec.ask.model):
            await self.one_server.pin(flow)
        else:
            rec.ask.body = {}  # nothing of a prompt is kept while it waits
            rec.ask.settle(self.dispatch.fleet.usual(rec.ask.key))
            self.dispatch.speeds.demand.note(rec.ask, self.dispatch.now())
            flow.response = await self.dispatch.place(flow, rec)
        rec.ask.body = {}
