"""What every handler of an embedded node shares: its models and runners, reading a body, writing an error."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import zstandard
from aiohttp import web

from agent.report import ShardLoad
from shard import bodies
from shard.llama_server import LlamaServerError, Unloadable
from shard.models import Models, ServedModel
from shard.options import keep_alive_s, resolve
from shard.replies import UpstreamError
from shard.runners import NoRoom, Runner, Runners
from shard.translate import Refusal

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from shard.coordinator import Coordinator

# Ollama bounds what a zstd body may unpack to (middleware/zstd.go).
MAX_UNPACKED_BYTES = 20 * 2**20

# A client that streams is told how far a load is, for the first time after so long, then every so often. A
# shorter load is waited for in silence: nothing has been sent then, so that any failure keeps its status.
TELL_AFTER_S = 5.0
TELL_EVERY_S = 2.0

# Says which plan served an answer; `sollol explain` shows that plan.
PLAN_HEADER = "x-sollol-shard-plan"
_plan_id: ContextVar[str | None] = ContextVar("plan_id", default=None)

# How often a request is run again that had sent nothing when its model broke.
REPLAYS = 3
# Of these, after failures for which no machine was to blame.
BLAMELESS_REPLAYS = 1

Tell = Callable[[ShardLoad], Awaitable[None]]

# What may go wrong upstream; the message is for the client.
UPSTREAM_ERRORS = (UpstreamError, LlamaServerError)


@dataclass(slots=True)
class Node:
    """An embedded node's parts; ``threads`` 0 leaves the number to llama-server.

    With a ``coordinator`` models may span several machines, else this one has them all to itself.
    """

    models: Models
    runners: Runners
    parallel: int = 1
    threads: int = 0
    coordinator: Coordinator | None = None
    faults: int = 0  #: requests that ended in a fault of this node's own code

    @contextlib.asynccontextmanager
    async def lease(
        self,
        model: ServedModel,
        ask: Mapping[str, Any],
        options: Mapping[str, Any],
        tell: Tell | None = None,
        *,
        embeddings: bool = False,
    ) -> AsyncIterator[Runner]:
        """Give the model's runner, loaded as ``options`` want it; raises as :meth:`Runners.lease`.

        With ``embeddings`` it can embed. A load that takes long is told to ``tell`` now and then, where the
        node knows how far it is.
        """
        launch = model.launch(options, parallel=self.parallel, threads=self.threads)
        # A full context makes room for more unless the request forbids it, as with Ollama.
        shift = ask.get("shift") is not False
        launch = replace(launch, context_shift=shift, embeddings=launch.embeddings or embeddings)
        telling = None
        if tell is not None and self.coordinator is not None:
            telling = asyncio.create_task(_tell_progress(self.coordinator, model, tell))
        try:
            async with self.runners.lease(model, launch, keep_alive_of(ask)) as runner:
                await _end(telling)
                _plan_id.set(runner.server.plan_id)
                yield runner
        finally:
            await _end(telling)


async def _tell_progress(coordinator: Coordinator, model: ServedModel, tell: Tell) -> None:
    await asyncio.sleep(TELL_AFTER_S)
    while True:
        if (load := coordinator.load_of(model)) is not None and load.phase != "ready":
            await tell(load)
        await asyncio.sleep(TELL_EVERY_S)


async def _end(telling: asyncio.Task[None] | None) -> None:
    if telling is not None:
        telling.cancel()
        # What it may have raised is that the client has left, which whoever answers notices as well.
        await asyncio.wait({telling})


NODE: web.AppKey[Node] = web.AppKey("node", Node)


def keep_alive_of(ask: Mapping[str, Any]) -> float | None:
    """Return the request's keep_alive in seconds, None if it has none. Raises Refusal if it is malformed."""
    try:
        return keep_alive_s(ask.get("keep_alive"))
    except ValueError as error:
        raise Refusal(400, str(error)) from error


def options_of(ask: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """Return the request's options, resolved. Raises Refusal if one is malformed."""
    given = ask.get("options")
    if given is not None and not isinstance(given, Mapping):
        raise Refusal(400, "options must be an object")
    try:
        header = model.header
        given = model.effective_options(given)
        return resolve(given, header.context_length, embeds=header.is_embedding_model)
    except ValueError as error:
        raise Refusal(400, str(error)) from error


async def read_body(request: web.Request, shape: type | None = None) -> dict[str, Any]:
    """Return the JSON object of a request, of a ``shape`` of :mod:`shard.bodies`. Raises Refusal."""
    raw = await request.read()
    if request.path.startswith("/v1/") and request.headers.get("Content-Encoding") == "zstd":
        raw = _unpacked(raw)
    if not raw.strip():
        raise Refusal(400, "missing request body")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"invalid JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the request body must be a JSON object")
    if shape is not None:
        bodies.check(body, shape)
    return body


def _unpacked(raw: bytes) -> bytes:
    try:
        # Read through a stream: a frame's own word on its size is not to be trusted with memory.
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)) as stream:
            unpacked: bytes = stream.read(MAX_UNPACKED_BYTES + 1)
    except zstandard.ZstdError as error:
        raise Refusal(400, f"the zstd body cannot be unpacked: {error}") from error
    if len(unpacked) > MAX_UNPACKED_BYTES:
        raise Refusal(413, "request body too large")
    return unpacked


def now() -> str:
    """Return the time as Ollama stamps its objects."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def json_answer(body: Any, status: int = 200) -> web.Response:
    """Return a whole JSON answer with Ollama's content type."""
    return web.Response(
        body=orjson.dumps(body), status=status, content_type="application/json", charset="utf-8"
    )


_OPENAI_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_ANTHROPIC_TYPES = {400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error"}


def error_body(path: str, status: int, message: str) -> dict[str, Any]:
    """Return an error in the shape of the protocol that ``path`` belongs to."""
    if path.startswith("/v1/messages"):
        error = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}
        return {"type": "error", "error": error}
    if path.startswith("/v1/"):
        kind = _OPENAI_TYPES.get(status, "api_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {"error": message}


# The response of a request that was told how its load goes on: whatever happens later is said in it.
STARTED = web.RequestKey("started", web.StreamResponse)


# Whether the answer's head is on its way, after which no other answer can be given.
_ANSWERED = web.RequestKey("answered", bool)


async def say_plan(request: web.Request, response: web.StreamResponse) -> None:
    """Name the plan that serves this answer, in a header."""
    request[_ANSWERED] = True
    if (plan_id := _plan_id.get()) is not None:
        response.headers[PLAN_HEADER] = plan_id


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PLAIN = {404: "404 page not found", 405: "405 method not allowed"}


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what handlers raise into the answers that Ollama gives."""
    try:
        return await handler(request)
    except Refusal as refusal:
        status, message = refusal.status, refusal.message
    except UPSTREAM_ERRORS as error:
        status, message = 500, str(error)
    except web.HTTPRequestEntityTooLarge:
        status, message = 413, "request body too large"
    except web.HTTPException as error:
        if error.status not in _PLAIN:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.Response(text=_PLAIN[error.status], status=error.status, headers=headers)
    except Exception:  # the outermost boundary of a request
        request.app[NODE].faults += 1
        if request.get(_ANSWERED) and STARTED not in request:
            raise  # nothing but the connection's end can say it
        log.exception("%s failed", request.path)
        status, message = 500, "internal error; the node's log says more"
    started: web.StreamResponse | None = request.get(STARTED)
    if started is not None:
        await started.write(orjson.dumps(error_body(request.path, status, message)) + b"\n")
        await started.write_eof()
        return started
    return json_answer(error_body(request.path, status, message), status)


@web.middleware
async def fresh(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Look at Ollama's store first, where that is served: a model may have come a moment ago."""
    await request.app[NODE].models.refresh()
    return await handler(request)


@web.middleware
async def replay(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run a request again when the model broke under it before any of the answer was sent.

    Only where a coordinator can load the model anew on the machines that are left. A handler that raises has
    sent nothing but, perhaps, how a load goes on.
    """
    coordinator = request.app[NODE].coordinator
    tries = Replays()
    while True:
        blames = coordinator.blames if coordinator is not None else 0
        try:
            return await handler(request)
        except LlamaServerError as error:
            if coordinator is None or isinstance(error, NoRoom | Unloadable):
                raise
            await coordinator.settled()
            if not tries.another(blamed=coordinator.blames > blames):
                raise
            log.warning("%s is run again: %s", request.path, error)


@dataclass(slots=True)
class Replays:
    """How often a request was run again. One that breaks models by itself must not do so for long."""

    broken: int = 0
    blameless: int = 0

    def another(self, *, blamed: bool) -> bool:
        """Return whether to run it again after a failure, for which a machine was ``blamed`` or not."""
        self.broken += 1
        self.blameless += not blamed
        return self.broken <= REPLAYS and self.blameless <= BLAMELESS_REPLAYS
