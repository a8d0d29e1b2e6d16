"""An embedded node's HTTP server: Ollama's API over the models it was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import orjson
from aiohttp import web

from agent.pages import keep_out
from shard import inference, passthrough
from shard.llama_server import candidates
from shard.node import (
    NODE,
    PLAN_HEADER,
    Node,
    error_body,
    errors,
    fresh,
    json_answer,
    read_body,
    replay,
    say_plan,
)
from shard.runners import Runner
from shard.translate import Refusal

# The level of Ollama's API that this server speaks, told to clients that ask for a version.
OLLAMA_API_VERSION = "0.33.0"

# Images travel inside JSON; this bounds memory, not what a model may see.
MAX_BODY_BYTES = 256 * 2**20

# How long running answers may go on after a SIGTERM.
SHUTDOWN_GRACE_S = 3.0


async def root(_: web.Request) -> web.Response:
    """GET / as the CLI and health checks ask for it."""
    return web.Response(text="Ollama is running")


async def version(_: web.Request) -> web.Response:
    """GET /api/version."""
    return json_answer({"version": OLLAMA_API_VERSION})


async def status(_: web.Request) -> web.Response:
    """GET /api/status: nothing here ever asks a cloud."""
    return json_answer({"cloud": {"disabled": True, "source": "config"}})


async def tags(request: web.Request) -> web.Response:
    """GET /api/tags, newest first."""
    return json_answer({"models": [model.tag_row() for model in request.app[NODE].models]})


async def ps(request: web.Request) -> web.Response:
    """GET /api/ps: the loaded models."""
    node = request.app[NODE]
    return json_answer({"models": [ps_row(node, runner) for runner in node.runners.loaded()]})


def ps_row(node: Node, runner: Runner) -> dict[str, Any]:
    """Return the row of ``/api/ps``; a model over several machines has the memory of all of them."""
    row = runner.model.tag_row()
    kept = {key: row[key] for key in ("name", "model", "size", "digest", "details")}
    size_vram = row["size"] if runner.launch.num_gpu > 0 else 0
    load = node.coordinator.load_of(runner.model) if node.coordinator else None
    if load is not None and load.plan is not None:
        shares = load.plan.shares
        kept["size"] = sum(share.used_bytes or share.memory_bytes for share in shares)
        size_vram = sum(share.used_bytes or share.memory_bytes for share in shares if share.device != "CPU")
    return kept | {
        "expires_at": runner.expires_at.isoformat(),
        "size_vram": size_vram,
        "context_length": runner.launch.num_ctx,
    }


async def show(request: web.Request) -> web.Response:
    """POST /api/show."""
    ask = await read_body(request)
    model = request.app[NODE].models.find(ask.get("model") or ask.get("name"))
    return json_answer(await asyncio.to_thread(model.show, verbose=bool(ask.get("verbose"))))


_FIXED = (
    "this node serves the files that it was started with, or that Ollama stores beside it, and changes none; "
    "ask Ollama itself"
)


async def pull(request: web.Request) -> web.StreamResponse:
    """POST /api/pull: a model that is here is pulled already; another cannot be had."""
    ask = await read_body(request)
    name = ask.get("model") or ask.get("name")
    request.app[NODE].models.find(name, "cannot pull '{}': " + _FIXED)
    if ask.get("stream") is False:
        return json_answer({"status": "success"})
    steps = ("pulling manifest", "verifying sha256 digest", "success")
    lines = b"".join(orjson.dumps({"status": step}) + b"\n" for step in steps)
    return web.Response(body=lines, content_type="application/x-ndjson")


async def fixed(request: web.Request) -> web.Response:
    """Refuse what would change the set of models."""
    ask = await read_body(request)
    if request.path != "/api/create":  # which names what is not there yet
        request.app[NODE].models.find(ask.get("model") or ask.get("name") or ask.get("source"))
    raise Refusal(400, _FIXED)


# Method, path, handler; aiohttp answers HEAD wherever GET is.
ROUTES: tuple[tuple[str, str, Callable[..., object]], ...] = (
    ("GET", "/", root),
    ("GET", "/api/version", version),
    ("GET", "/api/status", status),
    ("GET", "/api/tags", tags),
    ("GET", "/api/ps", ps),
    ("POST", "/api/show", show),
    ("POST", "/api/generate", inference.generate),
    ("POST", "/api/chat", inference.chat),
    ("POST", "/api/embed", inference.embed),
    ("POST", "/api/embeddings", inference.embeddings),
    ("POST", "/api/pull", pull),
    ("POST", "/api/push", fixed),
    ("POST", "/api/create", fixed),
    ("POST", "/api/copy", fixed),
    ("DELETE", "/api/delete", fixed),
    ("GET", "/v1/models", passthrough.list_models),
    ("GET", "/v1/models/{model:.+}", passthrough.one_model),
    ("POST", "/v1/chat/completions", passthrough.forward),
    ("POST", "/v1/completions", passthrough.forward),
    ("POST", "/v1/embeddings", passthrough.forward),
    ("POST", "/v1/responses", passthrough.forward),
    ("POST", "/v1/messages", passthrough.forward),
)


def _refuse_page(request: web.Request, sentence: str) -> web.Response:
    return json_answer(error_body(request.path, 403, sentence), 403)


def make_app(
    node: Node, host: str, more: Iterable[web.RouteDef] = (), origins: Iterable[str] = ()
) -> web.Application:
    """Return the application, with ``more`` routes, to listen on ``host``; its cleanup ends all processes.

    ``origins`` are patterns of web pages that may ask, besides Ollama's defaults.
    """
    app = web.Application(middlewares=[errors, fresh, replay], client_max_size=MAX_BODY_BYTES)
    app[NODE] = node
    app.on_response_prepare.append(say_plan)
    keep_out(app, _refuse_page, listens_on=[host], origins=origins, exposed=PLAN_HEADER)
    app.add_routes(more)
    for method, path, handler in ROUTES:
        app.router.add_route(method, path, handler)  # type: ignore[arg-type]
        if method == "GET":
            app.router.add_route("HEAD", path, handler)  # type: ignore[arg-type]

    async def end_children(_: web.Application) -> AsyncIterator[None]:
        yield
        await node.runners.close()

    app.cleanup_ctx.append(end_children)
    return app


async def serve(
    node: Node,
    host: str,
    port: int,
    stop: asyncio.Event,
    listening: Callable[[str, int], Awaitable[None]],
    more: Iterable[web.RouteDef] = (),
    origins: Iterable[str] = (),
) -> None:
    """Serve until ``stop`` is set; ``listening`` is told the address, port 0 having become a real one.

    Running answers get :data:`SHUTDOWN_GRACE_S` to end. Raises OSError if the address is taken and
    LlamaServerError if there is no llama-server to run.
    """
    candidates()
    # A client that leaves cancels its handler, which closes the connection to llama-server.
    runner = web.AppRunner(
        make_app(node, host, more, origins),
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_GRACE_S,
        access_log=None,
        # Ollama decodes zstd on /v1 and nothing elsewhere; so do the handlers.
        auto_decompress=False,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound_host, bound_port = runner.addresses[0][:2]
        await listening(bound_host, bound_port)
        await stop.wait()
    finally:
        await runner.cleanup()
