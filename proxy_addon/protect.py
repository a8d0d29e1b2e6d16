"""An exception in a hook must end as a clear error, not as a request that goes on without its hook.

mitmproxy logs what a hook raises and carries on ("hooks fail open"). :func:`protect` wraps the hooks of an
addon: the exception is logged once with its traceback under the request's id, counted, and done is what
:data:`INSTEAD` has for the hook. A hook that is not there only looks: the flow goes on.

An addon that holds something for each request gives it up at the request's end; its ``let_go(flow)``, where
it has that method, is called if its own hook of the end has failed. ``let_go_client(client)`` likewise.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from mitmproxy import http
from mitmproxy.connection import Client
from mitmproxy.hooks import all_hooks
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator, Layer, NextLayer
from mitmproxy.proxy.server_hooks import ServerConnectionHookData

from proxy_addon import errors, record
from proxy_addon.attempt import Failure, NextChunk
from proxy_addon.endpoints import protocol_of
from proxy_addon.record import Record

log = logging.getLogger(__name__)

#: Events of the process, not of a request or connection: what they raise must reach mitmproxy.
LIFECYCLE = frozenset({"load", "configure", "running", "done", "update"})
SentBy = Callable[[Client], Record | None]
#: The hooks that end a request or a connection → what gives up all that was held for it.
ENDS = {"response": "let_go", "error": "let_go", "client_disconnected": "let_go_client"}


def hooks_of(addon: object) -> list[str]:
    """The names of the hooks of ``addon`` that are called for requests and connections."""
    return [name for name in all_hooks if name not in LIFECYCLE and callable(getattr(addon, name, None))]


def protect[T](addon: T, on_error: Callable[[str], None], sent_by: SentBy = lambda _client: None) -> T:
    """Wrap the hooks of ``addon`` in place; ``on_error`` is told the name of a hook that raised.

    ``sent_by`` tells for which request a client's upstream connection is.
    """
    for name in hooks_of(addon):
        setattr(addon, name, _wrap(addon, name, on_error, sent_by))
    return addon


def _wrap(addon: Any, name: str, on_error: Callable[[str], None], sent_by: SentBy) -> Callable[..., Any]:
    hook, title, instead = getattr(addon, name), f"{type(addon).__name__}.{name}", INSTEAD.get(name)
    if name == "next_layer":
        hook = _unless_refused(hook)
    let_go = getattr(addon, ENDS.get(name, ""), None)

    def failed(subject: Any) -> Awaitable[None] | None:
        rec = _record(subject, sent_by)
        request_id = rec.id if rec else secrets.token_hex(8)
        on_error(name)
        log.exception("%s failed (request id %s)", title, request_id)
        if let_go is not None:
            let_go(subject)
        return instead(subject, rec, request_id) if instead is not None else None

    async def awaited(rest: Awaitable[None], subject: Any) -> None:
        try:
            await rest
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - the outermost boundary of a hook
            pending = failed(subject)
            if pending is not None:
                await pending

    @functools.wraps(hook)
    def protected(subject: Any) -> Awaitable[None] | None:
        try:
            rest = hook(subject)
        except Exception:  # noqa: BLE001 - the outermost boundary of a hook
            return failed(subject)  # whoever calls hooks awaits what they return
        return None if rest is None else awaited(rest, subject)

    # For whoever calls many hooks and catches what they raise anyway (lean_addons.py).
    protected.bare, protected.failed = hook, failed  # type: ignore[attr-defined]
    return protected


def _record(subject: Any, sent_by: SentBy) -> Record | None:
    """The record of the request that a hook is called for, as far as one can tell."""
    match subject:
        case http.HTTPFlow():
            return record.of(subject)
        case Failure() | NextChunk():
            return record.of(subject.flow)
        case ServerConnectionHookData():
            return sent_by(subject.client)
    return None


# -- what happens instead --------------------------------------------------------------------------------


async def _answer(flow: http.HTTPFlow, rec: Record | None, request_id: str) -> None:
    protocol = rec.protocol if rec else protocol_of(flow.request.path)
    flow.response = errors.internal(protocol, request_id)
    flow.request.stream = False
    if rec is None:
        return
    rec.outcome = "failed"
    if rec.stream is not None:
        source, rec.stream = rec.stream.chunks, None
        await _close(source)


def _give_up(failure: Failure, rec: Record | None, request_id: str) -> None:
    failure.retry = False
    failure.response = errors.internal(rec.protocol if rec else "native", request_id)
    if rec is not None:
        rec.outcome = "failed"


async def _cut(chunk: NextChunk, rec: Record | None, request_id: str) -> None:
    """End a stream of our own in the client's protocol: the head, hence the status, is out already."""
    chunk.data = None
    if rec is None or rec.stream is None or rec.outcome == "cut":
        return
    rec.outcome = "cut"
    chunk.data = errors.stream_tail(rec.protocol, errors.own_fault(request_id), request_id)
    source, rec.stream.chunks = rec.stream.chunks, _nothing()
    await _close(source)


async def _close(source: AsyncIterator[bytes]) -> None:
    if (close := getattr(source, "aclose", None)) is not None:
        await close()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def _refuse_connect(data: ServerConnectionHookData, rec: Record | None, request_id: str) -> None:
    """Nothing may be contacted that the hook has not seen. It is not held against the node (failover.py)."""
    data.server.error = errors.own_fault(request_id)


def _refuse_client(client: Client, _rec: Record | None, request_id: str) -> None:
    """Remember it: there is no request yet that could be answered."""
    _REFUSED[client] = request_id


def _refuse_layer(next_layer: NextLayer, _rec: Record | None, request_id: str) -> None:
    next_layer.layer = Refusing(next_layer.context, request_id)


_REFUSED: WeakKeyDictionary[Client, str] = WeakKeyDictionary()  #: with the id under which the log says why


def _unless_refused(hook: Callable[[NextLayer], Any]) -> Callable[[NextLayer], Any]:
    """``hook``, but the request of a client whose ``client_connected`` has failed is answered."""

    @functools.wraps(hook)
    def chosen(next_layer: NextLayer) -> Any:
        refused = _REFUSED.get(next_layer.context.client)
        return hook(next_layer) if refused is None else _refuse_layer(next_layer, None, refused)

    return chosen


Instead = Callable[[Any, Record | None, str], Awaitable[None] | None]

#: What is done in the place of a hook that has raised, given its subject, its record and the request's id.
INSTEAD: dict[str, Instead] = {
    "http_connect": _answer,
    "requestheaders": _answer,
    "request": _answer,
    "responseheaders": _answer,
    "sollol_failure": _give_up,
    "sollol_next_chunk": _cut,
    "server_connect": _refuse_connect,
    "client_connected": _refuse_client,
    "next_layer": _refuse_layer,
}


class Refusing(Layer):
    """Answers whatever comes first on a connection with an internal error, and closes it."""

    def __init__(self, context: Any, request_id: str) -> None:
        super().__init__(context)
        self._request_id = request_id

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, events.DataReceived):
            path = event.data.partition(b" ")[2].partition(b" ")[0].decode("ascii", "replace")
            answer = errors.internal(protocol_of(path), self._request_id)
            answer.headers["connection"] = "close"
            yield commands.SendData(self.context.client, http1.assemble_response(answer))
            yield commands.CloseConnection(self.context.client)
