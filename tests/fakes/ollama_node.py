"""A node that behaves like Ollama 0.33, for tests and benchmarks.

In process, on an ephemeral loopback port::

    node = await FakeOllama(models=[FakeModel("llama3.2", size=2 << 30)], vram_bytes=8 << 30).start()
    node.host_port                         # "127.0.0.1:40113"
    node.fail(rst("after_chunks", chunks=3, path="/api/chat"))   # faults: tests/fakes/faults.py
    await node.wait_received(1, path="/api/chat")                # records: exchange.Received
    node.scheduler.loads, node.scheduler.runners                 # what it loaded, what is resident
    await node.stop()

The answer's tokens derive from the prompt: ``[[id:abc]]`` gives `` abc-0 abc-1 …`` and
:func:`tests.fakes.tokens.check_stream` finds each lost, doubled or foreign one; ``[[n:50]]`` sets the length.
Durations (load, prefill, decode, pull) are those of a real machine times ``time_scale``; what a client asks
for (keep_alive) is not scaled. The prefill and decode durations that a node reports are those of the model,
so learned speeds are exact; total and load durations are measured. The machine's sizes and speeds are the
fields of :class:`~tests.fakes.machine.NodeSpec`, given here by keyword.

To look at a moment without racing it: ``hold_loads()``, ``hold_tokens()``, then ``go_on()``.

Whole-node failures: ``refuse()`` (listener closed), ``drop_syns()`` (connecting never ends),
``accept_again()``, ``black_hole()`` (accepts, never answers), ``slow_accept(seconds)``, ``freeze()`` and
``thaw()`` (as SIGSTOP and SIGCONT), ``kill()`` (all connections reset, nothing listens), ``restart()`` (the
same port, nothing loaded).

As a process, for ``kill -9``, SIGSTOP and benchmarks (prints its address on the first line)::

    python -m tests.fakes.ollama_node --port 0 --models llama3.2,nomic-embed-text --time-scale 1
"""

from __future__ import annotations

import ipaddress
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Self

import orjson
import zstandard

from tests.fakes import anthropic_api, models_api, native_api, openai_api
from tests.fakes.engine import ApiError
from tests.fakes.exchange import Exchange, Received
from tests.fakes.faults import Fault
from tests.fakes.http1 import HttpServer
from tests.fakes.machine import NodeSpec
from tests.fakes.scheduler import Busy, LoadFailed, Scheduler
from tests.fakes.store import GIB, FakeModel, Store, canonical, embedding_model

__all__ = ["FakeModel", "FakeOllama", "Fault", "NodeSpec", "embedding_model"]

Handler = Callable[["FakeOllama", Exchange], Awaitable[None]]
ZSTD_LIMIT_BYTES = 20 << 20

ROUTES: dict[str, dict[str, Handler]] = {
    "/": {"GET": models_api.root, "HEAD": models_api.root},
    "/api/version": {"GET": models_api.version, "HEAD": models_api.version},
    "/api/status": {"GET": models_api.status},
    "/api/tags": {"GET": models_api.tags, "HEAD": models_api.tags},
    "/api/ps": {"GET": models_api.ps},
    "/api/show": {"POST": models_api.show},
    "/api/generate": {"POST": native_api.generate},
    "/api/chat": {"POST": native_api.chat},
    "/api/embed": {"POST": native_api.embed},
    "/api/embeddings": {"POST": native_api.embeddings},
    "/api/pull": {"POST": models_api.pull},
    "/api/push": {"POST": models_api.push},
    "/api/create": {"POST": models_api.create},
    "/api/delete": {"DELETE": models_api.delete},
    "/api/copy": {"POST": models_api.copy},
    "/api/blobs/*": {"HEAD": models_api.blob, "POST": models_api.blob},
    "/api/me": {"POST": models_api.signed},
    "/api/signout": {"POST": models_api.signed},
    "/api/user/keys/*": {"DELETE": models_api.signed},
    "/api/experimental/web_search": {"POST": models_api.signed},
    "/api/experimental/web_fetch": {"POST": models_api.signed},
    "/api/experimental/model-recommendations": {"GET": models_api.recommendations},
    "/v1/chat/completions": {"POST": openai_api.chat},
    "/v1/completions": {"POST": openai_api.completions},
    "/v1/embeddings": {"POST": openai_api.embeddings},
    "/v1/responses": {"POST": openai_api.responses},
    "/v1/audio/transcriptions": {"POST": openai_api.transcriptions},
    "/v1/models": {"GET": openai_api.models},
    "/v1/models/*": {"GET": openai_api.model},
    "/v1/messages": {"POST": anthropic_api.messages},
}
_ORIGIN = re.compile(
    r"^(https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:\d+)?|(app|file|tauri|vscode-webview|vscode-file)://.*)$"
)


def route(path: str) -> dict[str, Handler] | None:
    """Return the methods of a path, ``None`` if there is no such route."""
    if path in ROUTES:
        return ROUTES[path]
    parent, _, last = path.rpartition("/")
    return ROUTES.get(f"{parent}/*") if last else None


def host_allowed(host: str) -> bool:
    """Return whether a node that listens on loopback answers to this Host header."""
    name = host.rsplit(":", 1)[0] if re.search(r":\d+$", host) else host
    name = name.strip("[]").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in ("", "localhost") or name.endswith((".localhost", ".local", ".internal"))
    return address.is_loopback or address.is_private or address.is_unspecified


class FakeOllama:
    """One node: its HTTP server, its scheduler, its store."""

    def __init__(
        self,
        models: Iterable[FakeModel | str] = (FakeModel("llama3.2"),),
        *,
        remote: Iterable[FakeModel | str] = (),
        version: str = "0.33.0",
        host_check: bool = True,
        origin_check: bool = True,
        signed_in: bool = True,
        pull_bytes_s: float = 10 * GIB,
        keep_records: int = 100_000,
        **machine: Any,
    ) -> None:
        self.store = Store()
        for model in models:
            self.store.add(FakeModel(model) if isinstance(model, str) else model)
        for model in remote:
            offered = FakeModel(model) if isinstance(model, str) else model
            self.store.remote[canonical(offered.name) or ""] = offered
        self.spec = NodeSpec(**machine)
        self.version, self.signed_in, self.pull_bytes_s = version, signed_in, pull_bytes_s
        self.host_check, self.origin_check = host_check, origin_check
        self.node_id = str(uuid.uuid4())
        self.partials: dict[str, int] = {}
        self.server = HttpServer(self._serve, keep_records)
        self.scheduler = Scheduler(self.spec, self.server.notice)

    # life

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> Self:
        """Listen and return the node itself."""
        await self.server.listen(host, port)
        self.scheduler.start()
        return self

    async def stop(self) -> None:
        """Close everything; raises the first exception that a handler ended with."""
        await self.server.stop()
        await self.scheduler.stop()
        if self.server.errors:
            raise self.server.errors[0]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def host_port(self) -> str:
        """``127.0.0.1:port``."""
        return f"{self.server.host}:{self.server.port}"

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://{self.host_port}"

    @property
    def listening(self) -> bool:
        """Whether new connections are accepted."""
        return self.server.listening

    # what it received

    @property
    def received(self) -> list[Received]:
        """Every request since the start (or :meth:`forget`), in order."""
        return list(self.server.received)

    def requests(self, path: str | None = None, method: str | None = None) -> list[Received]:
        """Return the requests of a path and method."""
        return [
            r
            for r in self.server.received
            if path in (None, r.path) and (method is None or method == r.method)
        ]

    def forget(self) -> None:
        """Drop the records."""
        self.server.received.clear()

    async def wait_received(
        self, n: int = 1, path: str | None = None, timeout_s: float = 10.0
    ) -> list[Received]:
        """Return the requests of a path once there are ``n``; raises TimeoutError."""
        await self.wait_until(lambda: len(self.requests(path)) >= n, timeout_s)
        return self.requests(path)

    async def wait_finished(self, record: Received, timeout_s: float = 10.0) -> Received:
        """Return a record once its request has ended, however; raises TimeoutError."""
        await self.wait_until(lambda: record.finished_s is not None, timeout_s)
        return record

    async def wait_until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once ``holds()``, looked at whenever requests or loads begin or end; raises TimeoutError."""
        await self.server.notice.until(holds, timeout_s)

    # moments to hold, so that a test need not race the node

    def hold_loads(self) -> None:
        """Let no load end until :meth:`go_on`."""
        self.scheduler.loads_go_on.clear()

    def hold_tokens(self) -> None:
        """Let no token be generated until :meth:`go_on`; ``ps`` and all else is answered."""
        self.scheduler.tokens_go_on.clear()

    def go_on(self) -> None:
        """End :meth:`hold_loads` and :meth:`hold_tokens`."""
        self.scheduler.loads_go_on.set()
        self.scheduler.tokens_go_on.set()

    # failures

    def fail(self, *faults: Fault) -> None:
        """Let faults wait for their requests, in this order."""
        self.server.faults.extend(faults)

    @property
    def faults_left(self) -> list[Fault]:
        """The faults that still wait for a request."""
        return [fault for fault in self.server.faults if fault.times is None or fault.hits < fault.times]

    def heal(self) -> None:
        """Drop all waiting faults and accept and read as usual again (a hanging request stays hanging)."""
        self.server.faults.clear()
        self.server.accept_delay_s = None
        for connection in list(self.server.connections):
            connection.read_on()
        self.thaw()

    async def refuse(self) -> None:
        """Close the listener; established connections go on."""
        await self.server.refuse()

    async def drop_syns(self) -> None:
        """Let nobody connect, and nobody be told; established connections go on."""
        await self.server.drop_syns()

    async def accept_again(self) -> None:
        """Listen on the same port again, after :meth:`refuse` or :meth:`drop_syns`."""
        await self.server.refuse()
        await self.server.listen()

    def black_hole(self) -> None:
        """Accept connections and never read from them."""
        self.server.accept_delay_s = float("inf")

    def slow_accept(self, seconds: float) -> None:
        """Read from a new connection only ``seconds`` (unscaled) after it was made."""
        self.server.accept_delay_s = seconds

    def freeze(self) -> None:
        """Send nothing more on any connection, old or new, until :meth:`thaw`."""
        self.server.thawed.clear()

    def thaw(self) -> None:
        """Go on after :meth:`freeze`."""
        self.server.thawed.set()

    async def kill(self) -> None:
        """Die as of ``kill -9``: nothing listens, every connection is reset, nothing is loaded."""
        await self.server.stop(reset=True)
        await self.scheduler.stop()

    async def restart(self) -> None:
        """Come back on the same port with nothing loaded."""
        self.scheduler = Scheduler(self.spec, self.server.notice)
        await self.server.listen()
        self.scheduler.start()

    # requests

    async def json_body(self, exchange: Exchange) -> dict[str, Any]:
        """Return a request's JSON object; raises ApiError(400) as Ollama words it."""
        raw = await exchange.body()
        if exchange.record.path.startswith("/v1/") and exchange.lower.get("content-encoding") == "zstd":
            try:
                with zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                    raw = reader.read(ZSTD_LIMIT_BYTES + 1)
            except zstandard.ZstdError as problem:
                raise ApiError(400, "failed to decompress request body") from problem
            if len(raw) > ZSTD_LIMIT_BYTES:
                raise ApiError(400, "http: request body too large")
        if not raw.strip():
            raise ApiError(400, "missing request body")
        try:
            body = orjson.loads(raw)
        except json.JSONDecodeError as problem:
            raise ApiError(400, f"invalid character in JSON: {problem.msg}") from problem
        if not isinstance(body, dict):
            raise ApiError(400, "json: cannot unmarshal value into Go value of type api.Request")
        model = body.get("model", body.get("name"))
        if isinstance(model, str):
            exchange.record.notes["model"] = model
        return body

    async def _serve(self, exchange: Exchange) -> None:
        try:
            fault = exchange.fault
            if fault is not None and fault.do == "reply":
                raise ApiError(fault.status, fault.text)
            if not await self._refused(exchange):
                await self._route(exchange)
        except ApiError as problem:
            await self._error(exchange, problem.status, problem.text, problem.fields)
        except Busy as problem:
            await self._error(exchange, 503, str(problem), {})
        except LoadFailed as problem:
            await self._error(exchange, 500, str(problem), {})

    async def _refused(self, exchange: Exchange) -> bool:
        """Answer a foreign Host or Origin with 403 and an empty body, as the middleware does."""
        host, origin = exchange.lower.get("host", ""), exchange.lower.get("origin")
        if self.host_check and not host_allowed(host):
            await exchange.respond(403)
            return True
        if origin and self.origin_check and origin not in (f"http://{host}", f"https://{host}"):
            if not _ORIGIN.match(origin):
                await exchange.respond(403)
                return True
            if exchange.record.method == "OPTIONS":
                await exchange.respond(204, Access_Control_Allow_Origin=origin)
                return True
        return False

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.record.path, exchange.record.method
        methods = route(path)
        if methods is None:
            bare = path.rstrip("/")
            if bare and route(bare) is not None:
                return await exchange.respond(301 if method == "GET" else 307, Location=bare)
            return await exchange.respond(404, b"404 page not found", "text/plain")
        if method not in methods:
            allow = ", ".join(methods)
            return await exchange.respond(405, b"405 method not allowed", "text/plain", Allow=allow)
        await methods[method](self, exchange)

    async def _error(self, exchange: Exchange, status: int, text: str, fields: dict[str, str]) -> None:
        path = exchange.record.path
        if path == "/v1/messages":
            return await exchange.respond(status, anthropic_api.error_body(status, text), "application/json")
        if path.startswith("/v1/"):
            return await exchange.respond(status, openai_api.error_body(status, text), "application/json")
        await exchange.respond(status, orjson.dumps({"error": text, **fields}), native_api.JSON)


if __name__ == "__main__":
    from tests.fakes.process import main

    main()
