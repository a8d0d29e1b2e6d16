"""The agent's HTTP server: ``/v1/report``, ``/v1/in-flight``, ``/metrics``, ``/healthz``.

All of it is reading but ``/v1/in-flight``: there a proxy says what it has on this node, for others to reckon
with. That is open only from this machine or with the agent's token.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

from aiohttp import WSCloseCode, web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent import in_flight, metrics, sharing
from agent.pages import keep_out
from agent.report import Report
from agent.sampler import NotReady

logger = logging.getLogger(__name__)

# A sample older than this many seconds means that sampling itself is stuck.
UNHEALTHY_AFTER_S = 10.0


class Reporter(Protocol):
    """Where reports come from: a :class:`~agent.sampler.Sampler`, or whoever speaks for a node like one."""

    @property
    def parts(self) -> Sequence[Any]:
        """The polled parts, each with ``part`` and ``failures``."""
        ...

    def report(self, requests_in_flight: int | None = None) -> Report:
        """Return the latest report; raise NotReady if there is none yet."""
        ...


def make_app(
    reporter: Reporter,
    *,
    token: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    listens_on: Iterable[str] = ("127.0.0.1",),
) -> web.Application:
    """Return the agent's application, for a server that listens on these hosts.

    With ``token``, a caller who sends an ``Authorization: Bearer`` must send that one; callers without may
    read, but only those of this machine may share what they have in flight.
    """
    agent = _Agent(reporter, token, clock)
    app = web.Application(middlewares=[agent.say_errors_as_json])
    app.add_routes(agent.routes())
    app.on_shutdown.append(agent.close)
    keep_out(app, lambda _, sentence: _error(403, sentence), listens_on=listens_on)
    return app


def report_routes(
    reporter: Reporter, *, more: Callable[[], Iterable[Metric]], token: str | None = None
) -> list[web.RouteDef]:
    """Return the same routes for a server with others beside them, and ``more`` metrics of its own."""
    agent = _Agent(reporter, token, time.monotonic, more)

    def guarded(handler: Handler) -> Handler:
        return partial(agent.say_errors_as_json, handler=handler)

    return [web.get(route.path, guarded(route.handler)) for route in agent.routes()]


class _Agent:
    def __init__(
        self,
        reporter: Reporter,
        token: str | None,
        clock: Callable[[], float],
        more: Callable[[], Iterable[Metric]] | None = None,
    ) -> None:
        self._reporter = reporter
        self._token = token
        self._clock = clock
        self._shares = in_flight.Shares()
        self._sockets: set[web.WebSocketResponse] = set()
        self._said_refused = False
        self._registry = CollectorRegistry()
        for collect in (self._metrics, more):
            if collect is not None:
                self._registry.register(_ReportCollector(collect))
        ProcessCollector(registry=self._registry)
        self._errors = Counter(
            "sollol_agent_errors", "Requests that ended in a fault of the agent.", registry=self._registry
        )
        self._refused = Counter(
            "sollol_agent_in_flight_refused",
            "Proxies that were refused to share what is in flight: from afar, without the token.",
            registry=self._registry,
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/report", self._report),
            web.get(in_flight.PATH, self._share),
            web.get("/metrics", self._scrape),
            web.get("/healthz", self._healthz),
        ]

    async def _report(self, request: web.Request) -> web.Response:
        self._authenticated(request)  # who sends a token must send the right one
        report = self._reporter.report(self._shares.total())
        return web.Response(text=report.model_dump_json(), content_type="application/json")

    async def _share(self, request: web.Request) -> web.StreamResponse:
        if not self._authenticated(request) and not is_loopback(request):
            self._refuse(request)
        try:
            name = in_flight.proxy_id(request.query.get("proxy", ""))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        if not self._shares.has_room_for(name):
            raise web.HTTPServiceUnavailable(text="too many proxies share this node already")
        socket = web.WebSocketResponse(
            heartbeat=in_flight.HEARTBEAT_S, max_msg_size=in_flight.LONGEST_BYTES, compress=False
        )
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await sharing.attend(socket, self._shares, name, self._clock)
        finally:
            self._sockets.discard(socket)
        return socket

    async def close(self, _: web.Application) -> None:
        """Let proxies know that it ends, instead of waiting for them."""
        closing = (socket.close(code=WSCloseCode.GOING_AWAY) for socket in self._sockets)
        await asyncio.gather(*closing, return_exceptions=True)

    def _refuse(self, request: web.Request) -> NoReturn:
        self._refused.inc()
        if not self._said_refused:  # once: a proxy tries again and again
            self._said_refused = True
            logger.warning("a proxy at %s may not share what is in flight without the token", request.remote)
        raise web.HTTPForbidden(text="to share what is in flight from another machine takes the token")

    def _authenticated(self, request: web.Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if self._token is None or scheme.lower() != "bearer":
            return False
        if not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            raise web.HTTPUnauthorized(text="the bearer token is not this agent's")
        return True

    async def _scrape(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _healthz(self, request: web.Request) -> web.Response:
        report = self._reporter.report()
        if report.sample_age_s > UNHEALTHY_AFTER_S:
            raise web.HTTPServiceUnavailable(text=f"the newest sample is {report.sample_age_s:.0f} s old")
        return web.json_response({"status": "ok"})

    def _metrics(self) -> Iterator[Metric]:
        yield metrics.failures(self._reporter.parts)
        try:
            report = self._reporter.report(self._shares.total())
        except NotReady:
            return
        yield from metrics.from_report(report)

    @web.middleware
    async def say_errors_as_json(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except NotReady as error:
            return _error(503, str(error))
        except web.HTTPException as error:
            if error.status < 400:
                raise
            kept = {name: value for name, value in error.headers.items() if name == "Allow"}
            return _error(error.status, _sentence(request, error), kept)
        except Exception:  # the outermost boundary of a request
            logger.exception("%s %s failed", request.method, request.path)
            self._errors.inc()
            return _error(500, "the agent failed to answer; its log says why")


class _ReportCollector(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        return ()  # without it the registry would collect once at registration


def is_loopback(request: web.Request) -> bool:
    """Return whether the caller is on this machine."""
    try:
        return ipaddress.ip_address((request.remote or "").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _sentence(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{request.path} allows {', '.join(sorted(error.allowed_methods))}, not {request.method}"
    if isinstance(error, web.HTTPNotFound):
        known = ", ".join(("/v1/report", in_flight.PATH, "/metrics", "/healthz"))
        return f"there is no {request.path}; this agent has {known}"
    return error.text or error.reason


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": sentence}, status=status, headers=headers)
