"""The first addon that a request meets: whoever may not ask, or not so, is refused before the body is read.

Pages are checked here and not by the nodes, since the proxy rewrites Host, on which a node's same-origin
exemption rests. Needs mitmproxy's ``keep_host_header``, or the Host of the client is lost in reverse mode.
"""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping

from mitmproxy import http
from mitmproxy.proxy.mode_specs import ReverseMode

from agent import cors, host_header
from proxy_addon import access, errors, record
from proxy_addon.access import Refusal
from proxy_addon.fleet.node import Fleet
from proxy_addon.record import Record
from proxy_addon.settings import Address, Settings

#: Headers of an answer that a page may read.
EXPOSED = (
    "x-sollol-request-id,x-sollol-node,"
    "x-sollol-queue-wait,x-sollol-queue-position,x-sollol-queue-expected-wait,retry-after"
)

CLIENTS = 4096  #: addresses of which is kept whether they may ask


class Guard:
    """Client networks, loops, Host or target, Origin, framing and size, in this order."""

    def __init__(self, settings: Settings, fleet: Fleet, proxy_id: str | None = None) -> None:
        self.proxy_id = proxy_id or secrets.token_hex(8)
        self.fleet = fleet
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Check by ``settings`` from now on."""
        self.settings = settings
        self._origins = cors.DEFAULT_ORIGINS + settings.guard.origins
        self._hosts = tuple(name.lower() for name in settings.guard.hosts)
        self._clients: dict[str, Refusal | None] = {}  #: by address
        self._checks_host = host_header.is_loopback(settings.listen.host)
        addresses: tuple[Address, ...] = (settings.listen, *settings.nodes)
        #: What means the fleet besides its nodes' addresses: our own port, names with many addresses.
        self._named = {form for a in addresses for form in access.spellings(a.host, a.port)}

    def stamp(self, headers: MutableMapping[str, str]) -> None:
        """Mark a request to a node (polls as well), so that it is known if it comes back."""
        access.stamp(headers, self.proxy_id)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """Refuse every tunnel: what is inside could not be seen."""
        flow.response = errors.response("native", 403, access.NO_TUNNELS)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Refuse the request, answer a preflight, or let it pass without its Origin."""
        seen = record.of(flow)
        if seen is None:
            return  # not a request of the chain: the last guard, at server_connect, refuses it
        refusal = self._refusal(flow, seen)
        origin = seen.headers.get("origin", "")
        foreign = origin and not cors.same_origin(origin, _host(flow, seen))
        if "origin" in seen.headers:
            del flow.request.headers["origin"]
        if foreign and (refusal is None or refusal.status != 403):
            seen.origin = origin
        if refusal:
            seen.outcome = "refused"
            flow.response = errors.refused(seen.protocol, refusal, seen.id)
        elif seen.method == "OPTIONS":
            flow.response = _preflight(flow, origin)
        if flow.response:
            self.responseheaders(flow)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Tell the browser that its page may read the answer."""
        seen = record.of(flow)
        if flow.response and seen and seen.origin:
            flow.response.headers.update(cors.answer_headers(seen.origin, EXPOSED))

    def _refusal(self, flow: http.HTTPFlow, seen: Record) -> Refusal | None:
        headers = seen.headers
        return (
            (self._client(seen.client) if seen.client else None)
            or access.loop(headers, self.proxy_id)
            or (self._own_host(flow, seen) if _reverse(flow) else self._target(flow))
            or self._origin(flow, seen)
            or access.framing(headers)
            or (seen.held.announced(int(headers.get("content-length", "0"))) if seen.held else None)
        )

    def _client(self, address: str) -> Refusal | None:
        """What :func:`access.client` says, asked once for each address."""
        if address not in self._clients:
            if len(self._clients) >= CLIENTS:
                self._clients.clear()
            self._clients[address] = access.client(address, self.settings.guard.clients)
        return self._clients[address]

    def _own_host(self, flow: http.HTTPFlow, seen: Record) -> Refusal | None:
        if not self._checks_host:
            return None
        # A target in absolute form counts instead of the Host (RFC 9112 §3.2.2); both must be good.
        target = flow.request.data.authority.decode("latin-1")
        return access.host(_host(flow, seen), self._hosts) or (
            access.host(target, self._hosts) if target else None
        )

    def _target(self, flow: http.HTTPFlow) -> Refusal | None:
        request = flow.request
        spellings = access.spellings(request.host, request.port)
        return access.target(
            (request.scheme, request.host, request.port),
            any(self.fleet.find(*spelling) or spelling in self._named for spelling in spellings),
            self.settings.guard.any_11434,
            [node.name for node in self.fleet],
        )

    def _origin(self, flow: http.HTTPFlow, seen: Record) -> Refusal | None:
        origin = seen.headers.get("origin", "")
        if not origin or cors.same_origin(origin, _host(flow, seen)):
            return None
        if cors.admitted(origin, self._origins):
            return None
        return Refusal(403, f"pages of {origin} may not ask here; guard.origins lists those that may")


def _host(flow: http.HTTPFlow, seen: Record) -> str:
    """The Host as the client sent it, or what HTTP/2 has in its place."""
    return seen.headers.get("host") or flow.request.host_header or ""


def _reverse(flow: http.HTTPFlow) -> bool:
    return isinstance(flow.client_conn.proxy_mode, ReverseMode)


def _preflight(flow: http.HTTPFlow, origin: str) -> http.Response:
    asked = flow.request.headers.get("access-control-request-headers", "")
    return http.Response.make(204, b"", cors.preflight_headers(origin, asked) if origin else {})
