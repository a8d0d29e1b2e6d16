"""What is asked about the proxy itself: metrics, the dashboard's data, the fleet, decisions.

Whoever the guard admits may ask; nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import unquote

import orjson
from mitmproxy import http

from proxy_addon import errors, record, views
from proxy_addon.dispatch import Dispatch
from proxy_addon.fleet.node import Fleet
from proxy_addon.intake import path_of
from proxy_addon.journal import Journal
from proxy_addon.reload import Reloader
from proxy_addon.telemetry import Telemetry

PREFIX = "/sollol/"
EXPLAIN = "/sollol/explain/"
DEFAULT_LIMIT = 20
MAX_LIMIT = 1000
REQUEST = "request"  #: the kind of entry that a request is; of other kinds are notes of what the proxy did


class Admin:
    """Answers :attr:`routes` and everything below ``/sollol/``."""

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        telemetry: Telemetry,
        dispatch: Dispatch,
        reloader: Reloader,
    ) -> None:
        self.fleet = fleet
        self.journal = journal
        self.telemetry = telemetry
        self.dispatch = dispatch
        self.reloader = reloader
        self.routes: Mapping[str, Callable[[http.Request], http.Response]] = {
            "/metrics": self._metrics,
            "/api/dashboard": lambda _: _json(views.dashboard(fleet, telemetry, dispatch.now())),
            "/sollol/status": self._status,
            "/sollol/nodes": lambda _: _json({"nodes": views.nodes(fleet, telemetry, dispatch.now())}),
            "/sollol/queue": self._queue,
            "/sollol/decisions": self._decisions,
            "/sollol/healthz": self._healthz,
        }

    def request(self, flow: http.HTTPFlow) -> None:
        """Answer if the path is ours: 404 for what is not there, 405 for what is not a question."""
        rec = record.of(flow)
        path = rec.path if rec is not None else path_of(flow)
        if flow.response is not None or not (path in self.routes or path.startswith(PREFIX)):
            return
        answer = self._explain if path.startswith(EXPLAIN) else self.routes.get(path)
        if answer is None:
            known = ", ".join([*self.routes, f"{EXPLAIN}ID"])
            flow.response = errors.response("native", 404, f"there is no {path}; there are {known}")
        elif flow.request.method not in ("GET", "HEAD"):
            flow.response = errors.response(
                "native", 405, f"{path} answers GET only", headers={"allow": "GET, HEAD"}
            )
        else:
            flow.response = answer(flow.request)
        if flow.request.method == "HEAD":
            flow.response.data.content = b""  # the head stays as it would be for a GET

    def _metrics(self, request: http.Request) -> http.Response:
        text, content_type = self.telemetry.expose(request.headers.get("accept", ""))
        return http.Response.make(200, text, {"content-type": content_type})

    def _status(self, _: http.Request) -> http.Response:
        policy = self.dispatch.settings.placement
        standings = self.dispatch.admission.standings()
        answer = views.status(self.fleet, self.telemetry, policy, standings, self.dispatch.now())
        last = self.reloader.last
        return _json(answer | {"reload": last.as_json() if last is not None else None})

    def _queue(self, _: http.Request) -> http.Response:
        return _json({"queue": views.queue(self.dispatch.admission.standings())})

    def _healthz(self, _: http.Request) -> http.Response:
        """503 where no node can serve, so that a balancer before several proxies goes elsewhere."""
        condition = views.condition(self.fleet, self.dispatch.now())
        return _json({"status": condition}, 503 if condition == "unhealthy" else 200)

    def _decisions(self, request: http.Request) -> http.Response:
        asked = request.query.get("limit", str(DEFAULT_LIMIT))
        if not (asked.isascii() and asked.isdecimal() and 1 <= int(asked[:9]) <= MAX_LIMIT):
            return errors.response("native", 400, f"limit should be 1 to {MAX_LIMIT}, not {asked[:40]!r}")
        kind = request.query.get("kind", REQUEST)
        if kind == REQUEST:
            return _json({"requests": self.journal.recent(int(asked))})
        return _json({"notes": self.journal.noted(kind, int(asked))})

    def _explain(self, request: http.Request) -> http.Response:
        request_id = unquote(request.path.partition("?")[0].removeprefix(EXPLAIN))
        made = self.journal.get(request_id)
        if made is None:
            return errors.response("native", 404, f"no request {request_id[:40]!r} is in the journal")
        return _json(made)


def _json(value: object, status: int = 200) -> http.Response:
    return http.Response.make(
        status,
        orjson.dumps(value),
        {"content-type": "application/json; charset=utf-8", "cache-control": "no-store"},
    )
