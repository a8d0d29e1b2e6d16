"""What is asked about the proxy itself: metrics, the dashboard's data, the fleet, decisions.

Whoever the guard admits may ask; nothing here changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
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
from proxy_addon.workers import merge
from proxy_addon.workers.merge import MERGES
from proxy_addon.workers.siblings import Siblings
from proxy_addon.workers.worker import Worker

PREFIX = "/sollol/"
EXPLAIN = "/sollol/explain/"
METRICS, DECISIONS = "/metrics", "/sollol/decisions"
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
        worker: Worker | None = None,
    ) -> None:
        self.fleet = fleet
        self.journal = journal
        self.telemetry = telemetry
        self.dispatch = dispatch
        self.reloader = reloader
        self.siblings = Siblings(worker or Worker(), dispatch.settings.state_dir, self.local)
        self.routes: Mapping[str, Callable[[http.Request], http.Response]] = {
            METRICS: self._metrics,
            "/api/dashboard": lambda _: _json(views.dashboard(fleet, telemetry, dispatch.now())),
            "/sollol/status": self._status,
            "/sollol/nodes": lambda _: _json({"nodes": views.nodes(fleet, telemetry, dispatch.now())}),
            "/sollol/queue": self._queue,
            DECISIONS: self._decisions,
            "/sollol/healthz": self._healthz,
        }

    def local(self, path: str) -> tuple[int, bytes]:
        """What this process alone says to ``path`` with its query: HTTP status and body."""
        request = http.Request.make("GET", f"http://worker{path}")
        answer = self._route(path.partition("?")[0])
        made = answer(request) if answer is not None else _json({}, 404)
        return made.status_code, made.data.content or b""

    def _route(self, path: str) -> Callable[[http.Request], http.Response] | None:
        return self._explain if path.startswith(EXPLAIN) else self.routes.get(path)

    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """Answer if the path is ours: 404 for what is not there, 405 for what is not a question.

        Where there are several workers, for all of them: once they have been asked.
        """
        rec = record.of(flow)
        path = rec.path if rec is not None else path_of(flow)
        if flow.response is not None or not (path in self.routes or path.startswith(PREFIX)):
            return None
        answer = self._route(path)
        if answer is None:
            known = ", ".join([*self.routes, f"{EXPLAIN}ID"])
            flow.response = errors.response("native", 404, f"there is no {path}; there are {known}")
        elif flow.request.method not in ("GET", "HEAD"):
            flow.response = errors.response(
                "native", 405, f"{path} answers GET only", headers={"allow": "GET, HEAD"}
            )
        elif self.siblings.worker.of > 1 and (path in (METRICS, *MERGES) or path.startswith(EXPLAIN)):
            return self._for_all(flow, path)
        else:
            flow.response = answer(flow.request)
        _headed(flow)
        return None

    async def _for_all(self, flow: http.HTTPFlow, path: str) -> None:
        """Answer with what all workers know."""
        answers = await self.siblings.ask(flow.request.path)
        told = {number: body for number, (status, body) in answers.items() if status == 200}
        if not told:
            status, body = answers[self.siblings.worker.number]
            flow.response = _response(status, body)
        elif path == METRICS:
            text, kind = merge.metrics({number: body.decode() for number, body in told.items()})
            flow.response = http.Response.make(200, text, {"content-type": kind})
        elif path.startswith(EXPLAIN):
            flow.response = _response(200, next(iter(told.values())))
        else:
            merged = MERGES[path]({number: orjson.loads(body) for number, body in told.items()})
            if path == DECISIONS:
                limit = int(flow.request.query.get("limit", DEFAULT_LIMIT))
                merged = {name: rows[:limit] for name, rows in merged.items()}
            flow.response = _json(merged)
        _headed(flow)

    def _metrics(self, request: http.Request) -> http.Response:
        text, content_type = self.telemetry.expose(request.headers.get("accept", ""))
        return http.Response.make(200, text, {"content-type": content_type})

    def _status(self, _: http.Request) -> http.Response:
        policy = self.dispatch.settings.placement
        standings = self.dispatch.admission.standings()
        answer = views.status(self.fleet, self.telemetry, policy, standings, self.dispatch.now())
        last = self.reloader.last
        return _json(answer | {"pid": os.getpid(), "reload": last.as_json() if last is not None else None})

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


def _headed(flow: http.HTTPFlow) -> None:
    if flow.request.method == "HEAD" and flow.response is not None:
        flow.response.data.content = b""  # the head stays as it would be for a GET


def _json(value: object, status: int = 200) -> http.Response:
    return _response(status, orjson.dumps(value))


def _response(status: int, body: bytes) -> http.Response:
    return http.Response.make(
        status,
        body,
        {"content-type": "application/json; charset=utf-8", "cache-control": "no-store"},
    )
