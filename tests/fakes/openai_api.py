"""The OpenAI routes: chat completions, completions, embeddings, models, responses, transcriptions."""

from __future__ import annotations

import base64
import email.parser
import email.policy
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from tests.fakes.engine import ApiError, Generation, Job, count_tokens, normalised
from tests.fakes.exchange import Exchange
from tests.fakes.native_api import ANSWER_TURN, embed_texts, find, prompt_of, require, wanted_tool
from tests.fakes.store import FakeModel, short

if TYPE_CHECKING:
    from tests.fakes.ollama_node import FakeOllama

JSON = "application/json"
SSE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}


def error_body(status: int, text: str) -> bytes:
    """Return an error in OpenAI's shape."""
    kind = ERROR_TYPES.get(status, "api_error")
    return orjson.dumps({"error": {"message": text, "type": kind, "param": None, "code": None}})


def event(value: object, name: str | None = None) -> bytes:
    """Return one server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(value) + b"\n\n"


def _usage(run: Generation) -> dict[str, int]:
    stats = run.stats
    total = stats.prompt_count + stats.eval_count
    return {
        "prompt_tokens": stats.prompt_count,
        "completion_tokens": stats.eval_count,
        "total_tokens": total,
    }


def _limit(body: dict[str, Any]) -> int | None:
    limit = body.get("max_completion_tokens", body.get("max_tokens", body.get("max_output_tokens")))
    return limit if isinstance(limit, int) else None


def _call(run: Generation) -> dict[str, Any]:
    call_id, name, arguments = run.tool_call()
    text = orjson.dumps(arguments).decode()
    return {"id": call_id, "index": 0, "type": "function", "function": {"name": name, "arguments": text}}


def _templated(shell: Callable[[str], dict[str, Any]]) -> Callable[[str], bytes]:
    """Return an encoder of chunks that differ in one text only, encoded once."""
    whole = event(shell("\0")).replace(b"@", b"\\u0040").replace(b"\\u0000", b"@")
    return lambda text: whole.replace(b"@", text.encode(), 1)


async def chat(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    body = await node.json_body(exchange)
    messages, tools = body.get("messages") or [], body.get("tools") or []
    if not messages:
        raise ApiError(400, "[] is too short - 'messages'")
    model, name = find(node, body.get("model")), body["model"]
    think = body.get("reasoning_effort") not in (None, "none")
    require(model, name, tools=bool(tools), think=think, what="chat")
    tool = wanted_tool(tools, messages)
    job = Job(
        model, name, prompt_of(messages), limit=_limit(body), think=think, tool=tool, answer_turn=ANSWER_TURN
    )
    async with Generation(node.scheduler, job) as run:
        base = {"id": f"chatcmpl-{run.tag}", "created": int(time.time()), "model": name}
        base["system_fingerprint"] = "fp_ollama"

        def delta(fields: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
            choice = {"index": 0, "delta": {"role": "assistant", **fields}, "finish_reason": reason}
            return {**base, "object": "chat.completion.chunk", **more, "choices": [choice]}

        def reason() -> str:
            return "tool_calls" if tool else run.stats.done_reason

        if not body.get("stream"):
            thinking, text = await run.whole()
            message: dict[str, Any] = {"role": "assistant", "content": text}
            message.update({"reasoning": thinking} if thinking else {})
            message.update({"tool_calls": [_call(run)]} if tool else {})
            choice = {"index": 0, "message": message, "finish_reason": reason()}
            whole = {**base, "object": "chat.completion", "choices": [choice], "usage": _usage(run)}
            return await exchange.respond(200, orjson.dumps(whole), JSON)
        encode: dict[str, Callable[[str], bytes]] = {
            "text": _templated(lambda text: delta({"content": text})),
            "thinking": _templated(lambda text: delta({"content": "", "reasoning": text})),
            "tool": lambda text: event(delta({"content": "", "tool_calls": [_call(run)]})),
        }
        exchange.error_chunk = lambda text: event(delta({"content": ""}, model=""))
        await _stream(exchange, run, lambda kind, text: encode[kind](text))
        await exchange.chunk(event(delta({"content": ""}, reason())))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {**base, "object": "chat.completion.chunk", "choices": [], "usage": _usage(run)}
            await exchange.chunk(event(usage))
        await exchange.chunk(DONE, last=True)
        await exchange.end()


async def _stream(exchange: Exchange, run: Generation, encode: Callable[[Any, str], bytes]) -> None:
    """Send a generation's pieces; the head goes out with the first."""
    started = False
    async for batch in run.pieces():
        if not started:
            await exchange.start(SSE)
            started = True
        await exchange.chunks([encode(kind, text) for kind, text in batch])
    if not started:
        await exchange.start(SSE)


async def completions(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/completions."""
    body = await node.json_body(exchange)
    model, name = find(node, body.get("model")), body["model"]
    require(model, name, tools=False, think=False, what="generate")
    job = Job(model, name, str(body.get("prompt") or ""), limit=_limit(body))
    async with Generation(node.scheduler, job) as run:
        base = {
            "id": f"cmpl-{run.tag}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        base["system_fingerprint"] = "fp_ollama"

        def choice(text: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
            return {**base, **more, "choices": [{"text": text, "index": 0, "finish_reason": reason}]}

        if not body.get("stream"):
            _, text = await run.whole()
            whole = choice(text, run.stats.done_reason, usage=_usage(run))
            return await exchange.respond(200, orjson.dumps(whole), JSON)
        encode = _templated(choice)
        exchange.error_chunk = lambda text: event(choice("", model=""))
        await _stream(exchange, run, lambda kind, text: encode(text))
        await exchange.chunk(event(choice("", run.stats.done_reason)))
        if (body.get("stream_options") or {}).get("include_usage"):
            await exchange.chunk(event({**base, "choices": [], "usage": _usage(run)}))
        await exchange.chunk(DONE, last=True)
        await exchange.end()


async def embeddings(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/embeddings, as floats or base64."""
    body = await node.json_body(exchange)
    value = body.get("input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise ApiError(400, "invalid input")
    name = str(body.get("model") or "")
    model = node.store.find(name)
    if model is None:
        raise ApiError(404, f'model "{name}" not found, try pulling it first')
    vectors, _ = await embed_texts(node, model, name, texts, body)
    rows: list[dict[str, Any]] = []
    for index, vector in enumerate(map(normalised, vectors)):
        packed = body.get("encoding_format") == "base64"
        shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if packed else vector
        rows.append({"object": "embedding", "embedding": shown, "index": index})
    count = sum(map(count_tokens, texts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    answer = {"object": "list", "data": rows, "model": name, "usage": usage}
    await exchange.respond(200, orjson.dumps(answer), JSON)


def _model_row(model: FakeModel) -> dict[str, Any]:
    created = int(model.modified_at.timestamp())
    return {"id": short(model.name), "object": "model", "created": created, "owned_by": "library"}


async def models(node: FakeOllama, exchange: Exchange) -> None:
    """GET /v1/models: ``data`` is null if there is none."""
    rows = [_model_row(model) for model in node.store.listing()] or None
    await exchange.respond(200, orjson.dumps({"object": "list", "data": rows}), JSON)


async def model(node: FakeOllama, exchange: Exchange) -> None:
    """GET /v1/models/:model."""
    held = find(node, exchange.record.path.removeprefix("/v1/models/"))
    await exchange.respond(200, orjson.dumps(_model_row(held)), JSON)


async def responses(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/responses: text in, text out, named events."""
    body = await node.json_body(exchange)
    name, value = body.get("model"), body.get("input")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value or []
    held = find(node, name)
    prompt = prompt_of(m for m in messages if isinstance(m, dict))
    job = Job(held, str(name), prompt, limit=_limit(body))
    async with Generation(node.scheduler, job) as run:
        item_id = f"msg_{run.tag}"
        base = {"id": f"resp_{run.tag}", "object": "response", "created_at": int(time.time()), "model": name}
        base |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None}

        def item(text: str, status: str) -> dict[str, Any]:
            content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            shown = content if status == "completed" else []
            return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": shown}

        def response(text: str | None) -> dict[str, Any]:
            if text is None:
                return {**base, "status": "in_progress", "output": []}
            stats = run.stats
            usage = {
                "input_tokens": stats.prompt_count,
                "output_tokens": stats.eval_count,
                "total_tokens": stats.prompt_count + stats.eval_count,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            }
            return {**base, "status": "completed", "output": [item(text, "completed")], "usage": usage}

        if not body.get("stream"):
            _, text = await run.whole()
            return await exchange.respond(200, orjson.dumps(response(text)), JSON)
        number, said, started = 0, "", False
        where: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}

        async def send(kind: str, *, last: bool = False, **fields: Any) -> None:
            nonlocal number
            await exchange.chunk(event({"type": kind, "sequence_number": number, **fields}, kind), last=last)
            number += 1

        async for batch in run.pieces():
            if not started:
                started = True
                await exchange.start(SSE)
                await send("response.created", response=response(None))
                await send("response.in_progress", response=response(None))
                await send("response.output_item.added", output_index=0, item=item("", "in_progress"))
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                await send("response.content_part.added", **where, part=part)
            for _, text in batch:
                said += text
                await send("response.output_text.delta", **where, delta=text, logprobs=[])
        if not started:
            await exchange.start(SSE)
        await send("response.output_text.done", **where, text=said, logprobs=[])
        part = {"type": "output_text", "text": said, "annotations": [], "logprobs": []}
        await send("response.content_part.done", **where, part=part)
        await send("response.output_item.done", output_index=0, item=item(said, "completed"))
        await send("response.completed", response=response(said), last=True)
        await exchange.end()


async def transcriptions(node: FakeOllama, exchange: Exchange) -> None:
    """POST /v1/audio/transcriptions: multipart, the model is a form field; the text derives from the file."""
    head = f"Content-Type: {exchange.lower.get('content-type', '')}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + await exchange.body())
    if not message.is_multipart():
        raise ApiError(400, "failed to parse multipart form")
    fields: dict[str, bytes] = {}
    for part in message.iter_parts():
        payload = part.get_payload(decode=True)
        assert isinstance(payload, bytes)
        fields[str(part.get_param("name", header="content-disposition"))] = payload
    if "file" not in fields:
        raise ApiError(400, "file is required")
    name = fields.get("model", b"").decode()
    if not name:
        raise ApiError(400, "model is required")
    exchange.record.notes["model"] = name
    job = Job(find(node, name), name, fields["file"].decode("latin-1"))
    async with Generation(node.scheduler, job) as run:
        _, text = await run.whole()
    if fields.get("response_format") == b"text":
        return await exchange.respond(200, text.encode(), "text/plain; charset=utf-8")
    await exchange.respond(200, orjson.dumps({"text": text}), JSON)
