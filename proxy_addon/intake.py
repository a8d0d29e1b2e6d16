"""A request's entrance: its record is opened, its endpoint named, its body read once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mitmproxy import http

from proxy_addon import access, errors, record
from proxy_addon.ask import BadRequest, parse
from proxy_addon.body_budget import BodyBudget, Held
from proxy_addon.endpoints import Endpoint, match, protocol_of
from proxy_addon.reading import Reading, is_short
from proxy_addon.record import Record
from proxy_addon.settings import Settings


class Intake:
    """First addon of the chain."""

    def __init__(self, settings: Settings, now: Callable[[], float]) -> None:
        self.settings = settings
        self.now = now
        self.bodies = BodyBudget(settings.guard.buffered_bytes)

    def reconfigure(self, settings: Settings) -> None:
        """Requests that come from now on are served under ``settings``."""
        self.settings = settings
        self.bodies.reconfigure(settings)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Open the record: from here on every addon knows what was asked for, and how errors look."""
        path = path_of(flow)
        rec = record.open_for(flow, protocol_of(path), self.now())
        rec.path, rec.endpoint, rec.settings = path, match(path), self.settings
        if (trusted := self.settings.guard.trusted_proxies) and rec.client:
            rec.client = access.behind(rec.client, rec.headers, trusted)
        uploads = rec.endpoint is not None and rec.endpoint.path == "/api/blobs/*" and rec.method == "POST"
        rec.held = Held(self.bodies, None if uploads else self.settings.guard.body_limit_bytes)
        if rec.endpoint is not None and path.rstrip("/") == rec.endpoint.path != path:
            # A node would redirect, and not to here but past the proxy.
            flow.request.path = rec.endpoint.path + flow.request.path.removeprefix(path)
            rec.path = rec.endpoint.path

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Whoever asked with HEAD gets the head alone: a body would be read as the next answer."""
        rec = record.of(flow)
        if rec is not None and rec.method == "HEAD" and flow.response is not None:
            flow.response.data.content = b""  # the length stays that of the body which a GET would bring


class Understand:
    """Reads what is asked, once the guard has let it in and the whole body is here."""

    def __init__(self, ready: asyncio.Event) -> None:
        self.ready = ready  #: every node was looked at once; before that nothing is known of any model
        self._reading = Reading()

    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """Parse the ask; answer what is not understood in the protocol that was spoken."""
        rec = record.of(flow)
        if rec is None or flow.response is not None:
            return None
        if not self.ready.is_set():
            return self._once_ready(flow)
        endpoint = rec.endpoint
        if endpoint is None:
            flow.response = errors.plain(404, "404 page not found")
            return None
        if rec.method not in endpoint.methods:
            flow.response = errors.plain(405, "405 method not allowed")
            flow.response.headers["allow"] = ", ".join(sorted(endpoint.methods))
            return None
        content = flow.request.raw_content or b""
        if not is_short(rec.headers, content):
            return self._read(flow, rec, endpoint, content)
        try:
            rec.ask = parse(endpoint, rec.path, rec.headers, content, rec.client)
        except BadRequest as bad:
            flow.response = errors.response(rec.protocol, bad.status, bad.message, request_id=rec.id)
        return None

    async def _once_ready(self, flow: http.HTTPFlow) -> None:
        await self.ready.wait()
        if (rest := self.request(flow)) is not None:
            await rest

    async def _read(self, flow: http.HTTPFlow, rec: Record, endpoint: Endpoint, content: bytes) -> None:
        try:
            rec.ask = await self._reading.read(endpoint, rec.path, rec.headers, content, rec.client)
        except BadRequest as bad:
            flow.response = errors.response(rec.protocol, bad.status, bad.message, request_id=rec.id)

    async def done(self) -> None:
        """The proxy ends."""
        await self._reading.close()


def path_of(flow: http.HTTPFlow) -> str:
    """The request's path without its query."""
    return flow.request.path.partition("?")[0]
