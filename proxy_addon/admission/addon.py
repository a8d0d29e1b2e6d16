"""The addon at the door: whose request it is, how urgent, and whether its client may ask now."""

from __future__ import annotations

from collections.abc import Callable

from mitmproxy import http

from proxy_addon import errors, record
from proxy_addon.admission.limits import Limits, Refused
from proxy_addon.admission.priority import client_of, priority, strip_keys
from proxy_addon.ask import BadRequest
from proxy_addon.endpoints import Handling
from proxy_addon.record import Record
from proxy_addon.settings import Settings


class Door:
    """Before the line: what concerns one client. ``refuse`` makes the answer to whoever is over a limit."""

    def __init__(
        self,
        settings: Settings,
        now: Callable[[], float],
        refuse: Callable[[Record, Refused], http.Response],
    ) -> None:
        self.settings = settings
        self.now = now
        self.refuse = refuse
        self.limits = Limits()
        self._inside: set[str] = set()  # ids of the requests that count against their client's limit

    def reconfigure(self, settings: Settings) -> None:
        """The terms of requests that come from now on."""
        self.settings = settings

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Know the client, and keep its key from the nodes, whatever is asked."""
        rec, classes = record.of(flow), self.settings.clients
        if rec is None or not classes:
            return
        client = client_of(rec.headers, rec.client, classes)
        rec.client_name, rec.client_class = client.name, client.of
        strip_keys(flow.request.headers, classes)

    def request(self, flow: http.HTTPFlow) -> None:
        """Rank what is to be routed, or refuse it."""
        rec = record.of(flow)
        if rec is None or flow.response is not None or rec.ask is None:
            return
        ask, of = rec.ask, rec.client_class
        if ask.endpoint.handling is not Handling.ROUTE:
            return
        try:
            ask.priority = priority(ask.body, rec.headers, of, (rec.settings or self.settings).admission)
            if of is not None:
                ask.client, ask.weight = rec.client_name, of.weight
                self.limits.enter(of, ask.client, self.now())
                self._inside.add(rec.id)
        except BadRequest as bad:
            flow.response = errors.response(rec.protocol, bad.status, bad.message, request_id=rec.id)
        except Refused as refused:
            flow.response = self.refuse(rec, refused)

    def response(self, flow: http.HTTPFlow) -> None:
        """Answered."""
        self.let_go(flow)

    def error(self, flow: http.HTTPFlow) -> None:
        """Broken off, on either side."""
        self.let_go(flow)

    def let_go(self, flow: http.HTTPFlow) -> None:
        """It counts against its client's limit no longer."""
        rec = record.of(flow)
        if rec is None or rec.client_class is None or rec.id not in self._inside:
            return
        self._inside.discard(rec.id)
        self.limits.leave(rec.client_class, rec.client_name)
