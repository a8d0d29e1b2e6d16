"""Ollama's native inference routes: generate, chat, embed, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from tests.fakes.clock import clock_ns
from tests.fakes.engine import ApiError, Generation, Job, count_tokens, embedding, keep_alive_s, normalised
from tests.fakes.exchange import Exchange
from tests.fakes.store import FakeModel

if TYPE_CHECKING:
    from tests.fakes.ollama_node import FakeOllama

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"


def now() -> str:
    """Return the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def line(value: object) -> bytes:
    """Return one NDJSON line."""
    return orjson.dumps(value) + b"\n"


def error_line(text: str) -> bytes:
    """Return the last line of a stream that failed."""
    return line({"error": text})


def find(node: FakeOllama, name: object) -> FakeModel:
    """Return a held model; raises the 404 of generate and chat."""
    model = node.store.find(name) if isinstance(name, str) else None
    if model is None:
        raise ApiError(404, f"model '{name or ''}' not found")
    return model


def require(model: FakeModel, name: str, *, tools: bool, think: bool, what: str) -> None:
    """Raise the 400 of a model that lacks what a request needs."""
    if "completion" not in model.capabilities:
        raise ApiError(400, f'"{name}" does not support {what}')
    if tools and "tools" not in model.capabilities:
        raise ApiError(400, f"registry.ollama.ai/library/{name} does not support tools")
    if think and "thinking" not in model.capabilities:
        raise ApiError(400, f'"{name}" does not support thinking')


ANSWER_TURN = "\nassistant: "


def prompt_of(messages: Iterable[dict[str, Any]]) -> str:
    """Return the text of a conversation, from which the answer's tag is taken."""
    lines = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        lines.append(f"{message.get('role')}: {content or ''}")
    return "\n".join(lines)


def wanted_tool(tools: list[dict[str, Any]], messages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the function to call: the first one, unless the last message is already a tool's result."""
    if not tools or (messages and messages[-1].get("role") == "tool"):
        return None
    function = tools[0].get("function", tools[0])
    return function if isinstance(function, dict) else None


def limit_of(options: dict[str, Any]) -> int | None:
    """Return num_predict, ``None`` if the request names none."""
    limit = options.get("num_predict")
    return limit if isinstance(limit, int) else None


async def generate(node: FakeOllama, exchange: Exchange) -> None:
    """POST /api/generate."""
    body = await node.json_body(exchange)
    model, name = find(node, body.get("model")), body["model"]
    options, keep = body.get("options") or {}, keep_alive_s(body.get("keep_alive"))
    think = bool(body.get("think"))
    require(model, name, tools=False, think=think, what="generate")
    prompt = str(body.get("prompt") or "")
    if not prompt and not body.get("images"):
        reason = await _load_or_unload(node, model, name, options, keep)
        answer = {"model": name, "created_at": now(), "response": "", "done": True, "done_reason": reason}
        return await exchange.respond(200, orjson.dumps(answer), JSON)
    text = "\n".join(filter(None, (str(body.get("system") or ""), prompt)))
    job = Job(model, name, text, _with_shift(options, body), keep, limit_of(options), think)
    async with Generation(node.scheduler, job) as run:
        shell = {"model": name, "created_at": now(), "done": False}
        keys = {"text": ("response",), "thinking": ("response", "thinking")}
        await _answer(exchange, run, shell, keys, body.get("stream", True), chat=False)


async def chat(node: FakeOllama, exchange: Exchange) -> None:
    """POST /api/chat."""
    body = await node.json_body(exchange)
    if not body.get("model"):
        raise ApiError(400, "model is required")
    model, name = find(node, body.get("model")), body["model"]
    options, keep = body.get("options") or {}, keep_alive_s(body.get("keep_alive"))
    messages, tools, think = body.get("messages") or [], body.get("tools") or [], bool(body.get("think"))
    require(model, name, tools=bool(tools), think=think, what="chat")
    if not messages:
        reason = await _load_or_unload(node, model, name, options, keep)
        message = {"role": "assistant", "content": ""}
        answer = {"model": name, "created_at": now(), "message": message, "done": True, "done_reason": reason}
        return await exchange.respond(200, orjson.dumps(answer), JSON)
    job = Job(
        model,
        name,
        prompt_of(messages),
        _with_shift(options, body),
        keep,
        limit_of(options),
        think,
        wanted_tool(tools, messages),
        images=sum(len(m.get("images") or []) for m in messages),
        answer_turn=ANSWER_TURN,
    )
    async with Generation(node.scheduler, job) as run:
        shell = {"model": name, "created_at": now(), "done": False}
        keys = {"text": ("content",), "thinking": ("content", "thinking")}
        await _answer(exchange, run, shell, keys, body.get("stream", True), chat=True)


def _with_shift(options: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    return {**options, "shift": body["shift"]} if body.get("shift") is not None else options


async def _load_or_unload(
    node: FakeOllama, model: FakeModel, name: str, options: dict[str, Any], keep: float | None
) -> str:
    """Do what an empty prompt means and return its done_reason."""
    if keep == 0:
        node.scheduler.expire(model.blob)
        return "unload"
    node.scheduler.release(await node.scheduler.acquire(model, name, options, keep))
    return "load"


async def _answer(
    exchange: Exchange,
    run: Generation,
    shell: dict[str, Any],
    keys: dict[str, tuple[str, ...]],
    stream: bool,
    *,
    chat: bool,
) -> None:
    def wrap(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
        inner = {"message": {"role": "assistant", **fields}} if chat else fields
        return {"model": shell["model"], "created_at": now(), **inner, **more}

    def calls() -> dict[str, Any]:
        call_id, function, arguments = run.tool_call()
        call = {"id": call_id, "function": {"index": 0, "name": function, "arguments": arguments}}
        return {"content": "", "tool_calls": [call]}

    def final(fields: dict[str, Any]) -> bytes:
        more: dict[str, Any] = {"done": True, "done_reason": run.stats.done_reason}
        if not chat:
            more["context"] = [1, 2, 3]
        return orjson.dumps(wrap(fields, **more, **run.stats.fields()))

    main = keys["text"][0]
    if not stream:
        thinking, text = await run.whole()
        fields = {main: text, **({"thinking": thinking} if thinking else {})}
        return await exchange.respond(200, final({**fields, **(calls() if run.job.tool else {})}), JSON)
    exchange.error_chunk = error_line
    started = False
    templates = {kind: _template(wrap, names, main) for kind, names in keys.items()}
    async for batch in run.pieces():
        if not started:
            await exchange.start(NDJSON)
            started = True
        lines = [
            templates[kind].replace(b"@", text.encode(), 1)
            if kind != "tool"
            else line({**wrap(calls()), "done": False})
            for kind, text in batch
        ]
        await exchange.chunks(lines)
    if not started:
        await exchange.start(NDJSON)
    await exchange.chunk(final({main: ""}) + b"\n", last=True)
    await exchange.end()


def _template(wrap: Any, names: tuple[str, ...], main: str) -> bytes:
    """Return a chunk with ``@`` for the token, encoded once per stream; the model's own ``@`` is escaped."""
    whole = orjson.dumps(
        {**wrap({n: "" if n == main and len(names) > 1 else "\0" for n in names}), "done": False}
    )
    return whole.replace(b"@", b"\\u0040").replace(b"\\u0000", b"@") + b"\n"


async def embed(node: FakeOllama, exchange: Exchange) -> None:
    """POST /api/embed."""
    body = await node.json_body(exchange)
    began, name = clock_ns(), body.get("model")
    value = body.get("input")
    if isinstance(value, str):
        texts = [value] if value else []
    elif value is None:
        texts = []
    elif isinstance(value, list) and all(isinstance(text, str) for text in value):
        texts = value
    else:
        raise ApiError(400, "invalid input type")
    model = node.store.find(name) if isinstance(name, str) else None
    if model is None:
        raise ApiError(404, f'model "{name or ""}" not found, try pulling it first')
    vectors, load_ns = await embed_texts(node, model, str(name), texts, body)
    answer = {
        "model": name,
        "embeddings": [normalised(vector) for vector in vectors],
        "total_duration": clock_ns() - began,
        "load_duration": load_ns,
        "prompt_eval_count": sum(map(count_tokens, texts)),
    }
    await exchange.respond(200, orjson.dumps(answer), JSON)


async def embeddings(node: FakeOllama, exchange: Exchange) -> None:
    """POST /api/embeddings: one prompt, not normalised, the name in exactly its case."""
    body = await node.json_body(exchange)
    name = str(body.get("model") or "")
    model = node.store.find(name)
    if model is None or model.name.removesuffix(":latest") != name.removesuffix(":latest"):
        raise ApiError(404, f'model "{name}" not found, try pulling it first')
    prompt = str(body.get("prompt") or "")
    vectors, _ = await embed_texts(node, model, name, [prompt] if prompt else [], body)
    await exchange.respond(200, orjson.dumps({"embedding": vectors[0] if vectors else []}), JSON)


async def embed_texts(
    node: FakeOllama, model: FakeModel, name: str, texts: list[str], body: dict[str, Any]
) -> tuple[list[list[float]], int]:
    """Return one vector a text, and the load's duration in ns."""
    scheduler, dimensions = node.scheduler, int(body.get("dimensions") or model.embedding_length)
    began, keep = clock_ns(), keep_alive_s(body.get("keep_alive"))
    runner = await scheduler.acquire(model, name, body.get("options") or {}, keep)
    load_ns = clock_ns() - began
    try:
        for text in texts:
            slot, _ = await runner.take_slot(text)
            try:
                await scheduler.sleep(scheduler.prefill_s(runner, count_tokens(text)))
            finally:
                runner.give_slot(slot)
    finally:
        scheduler.release(runner)
    return [embedding(text, min(dimensions, model.embedding_length)) for text in texts], load_ns
