"""The addon for every endpoint that concerns the whole fleet: it only calls the functions beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
import orjson
from mitmproxy import http

from agent.ollama import names
from proxy_addon import errors, record
from proxy_addon.ask import Ask, BadRequest
from proxy_addon.endpoints import Handling
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.one_server import catalog, fan_out, pin, upstream
from proxy_addon.one_server.pull import Pull, targets
from proxy_addon.one_server.sticky import Creates
from proxy_addon.one_server.upstream import Caller
from proxy_addon.record import Record, Stream
from proxy_addon.settings import Settings

Refresh = Callable[[Iterable[Node]], Awaitable[None]]
Send = Callable[[http.HTTPFlow, Record, Node], None]
Handler = Callable[[http.HTTPFlow, Record, Ask], Awaitable[None]]

TARGET = "x-sollol-target"  #: header of a pull: the nodes that shall have the model, comma-separated


def place(flow: http.HTTPFlow, rec: Record, node: Node) -> None:
    """Let ``flow`` go to ``node``."""
    flow.request.scheme, flow.request.host, flow.request.port = "http", node.host, node.port  # Host follows
    rec.node, rec.placed = node, True


class OneServer:
    """Answers for the fleet, or sends the flow to the one node that can.

    ``http`` gives the session that all parts share, within a running loop. ``refresh`` reads the inventory of
    the given nodes anew and returns when it is in the fleet, ``look`` what they have in memory. ``send`` lets
    a flow go to a node.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        http: Callable[[], aiohttp.ClientSession],
        refresh: Refresh,
        send: Send = place,
        look: Refresh | None = None,
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._http = http
        self._refresh = refresh
        self._send = send
        self._look = look
        self._creates = Creates(fleet)
        self._handlers: dict[str, Handler] = {
            "/": self._root,
            "/api/version": self._version,
            "/api/status": self._status,
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            "/api/show": self._show,
            "/v1/models": self._openai_models,
            "/v1/models/*": self._openai_model,
            "/api/pull": self._pull,
            "/api/delete": self._delete,
            "/api/copy": self._copy,
            "/api/create": self._create,
            "/api/blobs/*": self._blob,
            "/api/push": self._push,
        }

    def reconfigure(self, settings: Settings) -> None:
        """Go by ``settings`` from now on."""
        self._settings = settings

    def requestheaders(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """Send a blob on to its node as it comes in, or say at once that the node has it."""
        rec = record.of(flow)
        if rec is None or rec.endpoint is None or rec.endpoint.path != "/api/blobs/*":
            return None
        if flow.response or rec.method != "POST":
            return None
        return _told(flow, rec, self._upload(flow, rec))

    def request(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """Answer or forward whatever is not routed by model."""
        rec = record.of(flow)
        if rec is None or rec.endpoint is None or rec.endpoint.handling is Handling.ROUTE:
            return None
        if rec.ask is None or flow.response or rec.placed:
            return None
        return _told(flow, rec, self._handlers.get(rec.endpoint.path, self._pinned)(flow, rec, rec.ask))

    def response(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """A create has ended: let the fleet know the model before the client learns of it."""
        rec = record.of(flow)
        if rec is None or rec.endpoint is None or rec.endpoint.path != "/api/create" or not rec.node:
            return None
        return self._refresh([rec.node])

    async def unload(self, flow: http.HTTPFlow) -> None:
        """Answer a generate or chat whose ``ask.unload`` is set: every node lets go of the model."""
        rec = record.of(flow)
        assert rec is not None and rec.ask is not None
        with _telling(flow, rec):
            await self._unload(flow, rec, rec.ask)

    async def pin(self, flow: http.HTTPFlow) -> None:
        """Send ``flow`` to the signed-in node, as a request for a cloud model."""
        rec = record.of(flow)
        assert rec is not None and rec.ask is not None
        with _telling(flow, rec):
            await self._pinned(flow, rec, rec.ask)

    # -- answered here --------------------------------------------------------------------------------

    async def _root(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        _answer(flow, 200, catalog.RUNNING.encode(), "text/plain; charset=utf-8")

    async def _version(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        nodes = upstream.up(self._fleet, _now_s())
        lowest = catalog.version(node.version for node in nodes)
        if lowest is None:
            raise BadRequest(503, "no node of the fleet has told its version yet")
        _json(flow, {"version": lowest})

    async def _status(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        _json(flow, catalog.status())

    async def _tags(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        upstream.up(self._fleet, _now_s())
        _json(flow, catalog.tags(self._fleet))

    async def _ps(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        nodes = upstream.up(self._fleet, _now_s())
        if self._look is not None:
            await self._look(nodes)  # the last poll may be older than the client's last stop
        _json(flow, catalog.ps(nodes))

    async def _openai_models(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        upstream.up(self._fleet, _now_s())
        _json(flow, catalog.openai_models(self._fleet))

    async def _openai_model(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        node = upstream.holders(self._fleet, ask.model, ask.key, _now_s())[0]
        _json(flow, catalog.openai_model(ask.model, node.models[ask.key]))

    # -- asked of nodes -------------------------------------------------------------------------------

    async def _show(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        now_s = _now_s()
        if names.is_cloud(ask.model) and not self._fleet.holders(ask.key, now_s):
            nodes = [pin.signed_in(self._fleet, self._settings.signed_in_node, now_s)]
        else:
            nodes = upstream.holders(self._fleet, ask.model, ask.key, now_s)
        answer = await self._caller().ask_until_known(nodes, "POST", flow.request.path, _body(flow))
        flow.response = answer.response()

    async def _delete(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        nodes = fan_out.to_delete(self._fleet, ask.key, _now_s())
        answer = await fan_out.delete(self._caller(), nodes, flow.request.path, _body(flow))
        await self._refresh([*nodes, *self._readers(nodes)])
        flow.response = answer.response()

    async def _copy(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        nodes = upstream.holders(self._fleet, ask.model, ask.key, _now_s())
        answer = await fan_out.copy(self._caller(), nodes, flow.request.path, _body(flow))
        await self._refresh([*nodes, *self._readers(nodes)])
        flow.response = answer.response()

    def _readers(self, nodes: list[Node]) -> list[Node]:
        """The coordinators: they list what ``nodes``, which have just changed, store."""
        return [node for node in self._fleet.up(_now_s()) if node.coordinator and node not in nodes]

    async def _pull(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        nodes, spares = self._pull_targets(flow, ask)
        pull = Pull(self._caller(), nodes, spares, ask.body, self._refresh)
        try:
            if not ask.stream:
                await _unless_left(rec, pull.ended())
            elif await _unless_left(rec, pull.begun()):
                rec.stream = Stream(_ndjson_head(), pull)
                return
            if not rec.left:
                status, row = pull.merge.result()
                _json(flow, row, status)
        finally:
            if rec.stream is None:
                await pull.aclose()

    def _pull_targets(self, flow: http.HTTPFlow, ask: Ask) -> tuple[list[Node], list[Node]]:
        now_s = _now_s()
        if wanted := flow.request.headers.pop(TARGET, ""):
            return [self._named(name.strip()) for name in wanted.split(",")], []
        if names.is_cloud(ask.model):
            return [pin.signed_in(self._fleet, self._settings.signed_in_node, now_s)], []
        return targets(upstream.up(self._fleet, now_s), ask.key, self._settings.pull.replicas)

    def _named(self, name: str) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            raise BadRequest(400, f"{TARGET}: {name} is not in the fleet")
        return node

    async def _unload(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        path = ask.endpoint.path
        nodes = fan_out.to_unload(self._fleet, ask.model, ask.key, _now_s())
        answer = await fan_out.unload(self._caller(), nodes, flow.request.path, _body(flow))
        if answer.ok:
            await self._refresh(nodes)
            _json(flow, fan_out.unloaded(path, ask.model, datetime.now(UTC)))
        else:
            flow.response = answer.response()

    # -- sent to one node -----------------------------------------------------------------------------

    async def _blob(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        _, has_it = await self._creates.for_blob(self._caller(), rec.client, flow.request.path, _now_s())
        _answer(flow, 200 if has_it else 404, b"", "")

    async def _upload(self, flow: http.HTTPFlow, rec: Record) -> None:
        # Ollama answers 200 to a blob that it has without reading it, and closes the connection on whoever is
        # still sending: so it is asked first.
        path, now_s = flow.request.path, _now_s()
        node, has_it = await self._creates.for_blob(self._caller(), rec.client, path, now_s)
        if has_it:
            _answer(flow, 200, b"", "")
            return
        self._creates.sent(path, node, now_s)
        self._forward(flow, rec, node)
        flow.request.stream = True

    async def _create(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        self._forward(
            flow, rec, await self._creates.for_create(self._caller(), rec.client, ask.body, _now_s())
        )

    async def _push(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        wanted = self._settings.signed_in_node
        self._forward(flow, rec, pin.pusher(self._fleet, wanted, ask.model, ask.key, _now_s()))

    async def _pinned(self, flow: http.HTTPFlow, rec: Record, ask: Ask) -> None:
        self._forward(flow, rec, pin.signed_in(self._fleet, self._settings.signed_in_node, _now_s()))

    def _forward(self, flow: http.HTTPFlow, rec: Record, node: Node) -> None:
        self._send(flow, rec, node)

    def _caller(self) -> Caller:
        return Caller(self._http(), self._settings.timeouts.connect_s)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


@contextmanager
def _telling(flow: http.HTTPFlow, rec: Record) -> Iterator[None]:
    """Answer a BadRequest raised within in the protocol that was spoken."""
    try:
        yield
    except BadRequest as bad:
        flow.response = errors.response(rec.protocol, bad.status, bad.message, request_id=rec.id)
        _without_body_of_head(flow)


async def _told(flow: http.HTTPFlow, rec: Record, work: Awaitable[None]) -> None:
    with _telling(flow, rec):
        await work


async def _unless_left[T](rec: Record, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what ``work`` returns, None if the client leaves before: then ``work`` is cancelled."""
    task = asyncio.create_task(work)
    rec.on_left.append(task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        task.cancel()
        if not rec.left:
            raise
        return None
    finally:
        if task.cancel in rec.on_left:
            rec.on_left.remove(task.cancel)


def _ndjson_head() -> http.Response:
    head = http.Response.make(200, b"", {"content-type": "application/x-ndjson"})
    del head.headers["content-length"]
    head.headers["transfer-encoding"] = "chunked"
    return head


def _body(flow: http.HTTPFlow) -> bytes:
    return flow.request.raw_content or b""


def _json(flow: http.HTTPFlow, value: Any, status: int = 200) -> None:
    _answer(flow, status, orjson.dumps(value), upstream.JSON)


def _answer(flow: http.HTTPFlow, status: int, body: bytes, content_type: str) -> None:
    flow.response = http.Response.make(status, body, {"content-type": content_type} if content_type else {})
    _without_body_of_head(flow)


def _without_body_of_head(flow: http.HTTPFlow) -> None:
    if flow.request.method == "HEAD" and flow.response:
        flow.response.raw_content = b""  # the length stays that of the body that a GET would bring
