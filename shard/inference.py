"""``/api/generate``, ``/api/chat``, ``/api/embed`` and ``/api/embeddings`` on a real llama-server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from agent.ollama import names
from shard.llama_server import LlamaServer
from shard.models import ServedModel
from shard.node import NODE, UPSTREAM_ERRORS, json_answer, keep_alive_of, now, options_of, read_body
from shard.replies import (
    CUT_STREAM,
    ChatReply,
    CompletionReply,
    Piece,
    Reply,
    SseReader,
    UpstreamError,
    chat_object,
    error_message,
    generate_object,
    statistics,
)
from shard.runners import Runner
from shard.translate import (
    Refusal,
    chat_body,
    completion_body,
    embed_inputs,
    generate_messages,
    infill_body,
    oldest_to_drop,
    render_template,
    shorten,
    surely_fits,
)

Shape = Callable[[str, str, Piece], dict[str, Any]]

# What an unanswered embedding says when its text is too long (llama.cpp, tools/server).
_TOO_LONG = ("too large", "exceed", "context size")


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /api/chat."""
    started = time.monotonic_ns()
    node, ask = request.app[NODE], await read_body(request)
    model = node.models.find(ask.get("model"))
    if not ask.get("messages") and keep_alive_of(ask) == 0:
        return await _unload(request, ask, model, chat_object)
    images = _has_images(ask.get("messages") or ())
    ask = _checked(model, ask, "chat", tools=bool(ask.get("tools")), images=images)
    options = options_of(ask, model)
    body = chat_body(ask, options)
    async with node.lease(model, ask, options) as runner:
        load_ns = time.monotonic_ns() - started
        if not body["messages"]:
            return json_answer(_lifecycle(ask, chat_object, "load"))
        async with runner.slots:
            if ask.get("truncate") is not False:
                body["messages"] = await _fitting(runner.server, body, options["num_ctx"])
            reply = ChatReply(top_logprobs=bool(ask.get("top_logprobs")))
            answer = _Answer(request, ask, chat_object, started, load_ns)
            return await answer.relay(runner, "/v1/chat/completions", body, reply)


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /api/generate."""
    started = time.monotonic_ns()
    node, ask = request.app[NODE], await read_body(request)
    model = node.models.find(ask.get("model"))
    if not ask.get("prompt") and keep_alive_of(ask) == 0:
        return await _unload(request, ask, model, generate_object)
    if ask.get("raw") and any(ask.get(field) for field in ("template", "system", "context")):
        raise Refusal(400, "raw mode does not support template, system, or context")
    ask = _checked(model, ask, "generate", suffix=bool(ask.get("suffix")), images=bool(ask.get("images")))
    options = options_of(ask, model)
    reply: Reply = CompletionReply(top_logprobs=bool(ask.get("top_logprobs")))
    async with node.lease(model, ask, options) as runner:
        answer = _Answer(request, ask, generate_object, started, time.monotonic_ns() - started)
        if not ask.get("prompt") and not ask.get("suffix"):
            return json_answer(_lifecycle(ask, generate_object, "load"))
        async with runner.slots:
            if ask.get("suffix"):
                return await answer.relay(runner, "/infill", infill_body(ask, options), reply)
            if ask.get("raw"):
                body = completion_body(ask, options, ask["prompt"])
                return await answer.relay(runner, "/completion", body, reply)
            if "thinking" in model.capabilities:
                # Only the chat route separates thinking from the answer.
                reply = ChatReply(top_logprobs=bool(ask.get("top_logprobs")))
                body = chat_body(ask | {"messages": generate_messages(ask)}, options)
                return await answer.relay(runner, "/v1/chat/completions", body, reply)
            prompt = await _prompt_ids(runner.server, ask)
            if len(prompt) >= options["num_ctx"]:
                raise Refusal(
                    400,
                    f"the prompt has {len(prompt)} tokens, longer than the context length of "
                    f"{options['num_ctx']}; shorten it or raise num_ctx",
                )
            answer.context = prompt
            return await answer.relay(runner, "/completion", completion_body(ask, options, prompt), reply)


async def embed(request: web.Request) -> web.StreamResponse:
    """POST /api/embed."""
    started = time.monotonic_ns()
    node, ask = request.app[NODE], await read_body(request)
    model = node.models.find(ask.get("model"), 'model "{}" not found, try pulling it first')
    inputs, options = embed_inputs(ask), options_of(ask, model)
    async with node.lease(model, ask, options) as runner:
        load_ns = time.monotonic_ns() - started
        if not inputs:
            return json_answer({"model": ask["model"], "embeddings": []})
        async with runner.slots:
            vectors, tokens = await _embeddings(runner, inputs, truncate=ask.get("truncate") is not False)
    return json_answer(
        {
            "model": ask["model"],
            "embeddings": [shorten(vector, ask.get("dimensions")) for vector in vectors],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": load_ns,
            "prompt_eval_count": tokens,
        }
    )


async def embeddings(request: web.Request) -> web.StreamResponse:
    """POST /api/embeddings, the older form: one text, a vector that is not normalised."""
    node, ask = request.app[NODE], await read_body(request)
    model = node.models.find(ask.get("model"), 'model "{}" not found, try pulling it first')
    async with node.lease(model, ask, options_of(ask, model)) as runner:
        if not ask.get("prompt"):
            return json_answer({"embedding": []})
        async with runner.slots:
            body = {"input": ask["prompt"], "embd_normalize": -1}
            answer = await _whole(runner.server, "/v1/embeddings", body)
    return json_answer({"embedding": answer["data"][0]["embedding"]})


class _Answer:
    """One generation on its way to the client, streamed or gathered."""

    def __init__(
        self, request: web.Request, ask: Mapping[str, Any], shape: Shape, started: int, load_ns: int
    ) -> None:
        self.request = request
        self.ask = ask
        self.shape = shape
        self.started = started
        self.load_ns = load_ns
        self.context: list[int] | None = None

    async def relay(
        self, runner: Runner, path: str, body: Mapping[str, Any], reply: Reply
    ) -> web.StreamResponse:
        """Return the client's response, complete. Raises what may still be answered with a status."""
        server = runner.server
        async with server.request("POST", path, body) as upstream:
            await _refuse_errors(server, upstream)
            lines = self._lines(server, upstream, reply)
            if self.ask.get("stream") is False:
                return json_answer(self._gathered([line async for line in lines]))
            return await self._stream(lines)

    async def _lines(
        self, server: LlamaServer, upstream: aiohttp.ClientResponse, reply: Reply
    ) -> AsyncIterator[dict[str, Any]]:
        reader, tokens, model = SseReader(), [], self.ask["model"]
        async for chunk in server.chunks(upstream):
            for event in reader.feed(chunk):
                piece = reply.take(event)
                if piece is None:
                    continue
                tokens += piece.tokens
                # Half of a character that spans tokens has no text of its own yet.
                if piece.content or piece.thinking or piece.tool_calls or piece.logprobs:
                    yield self.shape(model, now(), piece)
        if reply.final is None:
            raise UpstreamError(CUT_STREAM)
        last = self.shape(model, now(), Piece())
        last |= statistics(reply.final, time.monotonic_ns() - self.started, self.load_ns)
        if self.context is not None:
            last["context"] = [*self.context, *tokens]
        yield last

    async def _stream(self, lines: AsyncIterator[dict[str, Any]]) -> web.StreamResponse:
        # The first line is awaited before the headers go out, so that errors until then keep their status.
        line = await anext(lines)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(self.request)
        await response.write(orjson.dumps(line) + b"\n")
        try:
            async for line in lines:
                await response.write(orjson.dumps(line) + b"\n")
        except UPSTREAM_ERRORS as error:
            await response.write(orjson.dumps({"error": str(error)}) + b"\n")
        await response.write_eof()
        return response

    def _gathered(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        whole = Piece()
        for line in lines:
            part = line.get("message", line)
            whole.content += part.get("content", part.get("response", ""))
            whole.thinking += part.get("thinking", "")
            whole.tool_calls += part.get("tool_calls", [])
            whole.logprobs += line.get("logprobs", [])
        return lines[-1] | self.shape(self.ask["model"], lines[-1]["created_at"], whole) | {"done": True}


def _checked(
    model: ServedModel,
    ask: dict[str, Any],
    what: str,
    *,
    tools: bool = False,
    suffix: bool = False,
    images: bool = False,
) -> dict[str, Any]:
    if "completion" not in model.capabilities:
        raise Refusal(400, f'"{ask["model"]}" does not support {what}')
    for capability, needed in {"tools": tools, "insert": suffix}.items():
        if needed and capability not in model.capabilities:
            # Ollama names the model in full here.
            raise Refusal(400, f"{names.parse(model.name)} does not support {capability}")
    if images:
        raise Refusal(400, "this model is missing data required for image input")
    if "thinking" in model.capabilities:
        return {"think": True} | ask if ask.get("think") is None else ask
    if ask.get("think"):
        raise Refusal(400, f'"{ask["model"]}" does not support thinking')
    return {key: value for key, value in ask.items() if key != "think"}


def _has_images(messages: Sequence[Any]) -> bool:
    return any(isinstance(message, Mapping) and message.get("images") for message in messages)


def _lifecycle(ask: Mapping[str, Any], shape: Shape, reason: str) -> dict[str, Any]:
    return shape(ask["model"], now(), Piece()) | {"done": True, "done_reason": reason}


async def _unload(
    request: web.Request, ask: Mapping[str, Any], model: ServedModel, shape: Shape
) -> web.Response:
    await request.app[NODE].runners.unload(model)
    return json_answer(_lifecycle(ask, shape, "unload"))


async def _refuse_errors(server: LlamaServer, upstream: aiohttp.ClientResponse) -> None:
    if upstream.status >= 400:
        body = b"".join([chunk async for chunk in server.chunks(upstream)])
        raise Refusal(upstream.status, error_message(body))


async def _whole(server: LlamaServer, path: str, body: Mapping[str, Any]) -> Any:
    status, raw = await server.post(path, body)
    if status >= 400:
        raise Refusal(status, error_message(raw))
    return orjson.loads(raw)


async def _tokens(server: LlamaServer, text: str, *, add_special: bool) -> list[int]:
    answer = await _whole(server, "/tokenize", {"content": text, "add_special": add_special})
    return list(answer["tokens"])


async def _prompt_ids(server: LlamaServer, ask: Mapping[str, Any]) -> list[int]:
    # As ids, so that the next request's ``context`` goes on with exactly these and hits the prefix cache.
    if ask.get("template"):
        text = render_template(ask["template"], system=ask.get("system") or "", prompt=ask["prompt"])
    else:
        rendered = await _whole(server, "/apply-template", {"messages": generate_messages(ask)})
        text = rendered["prompt"]
    before = list(ask.get("context") or ())
    return before + await _tokens(server, text, add_special=not before)


async def _fitting(server: LlamaServer, body: Mapping[str, Any], num_ctx: int) -> list[dict[str, Any]]:
    messages = list(body["messages"])
    while not surely_fits(messages, num_ctx) and (oldest := oldest_to_drop(messages)) is not None:
        rendered = await _whole(server, "/apply-template", dict(body) | {"messages": messages})
        if len(await _tokens(server, rendered["prompt"], add_special=True)) < num_ctx:
            break
        del messages[oldest]
    return messages


async def _embeddings(
    runner: Runner, inputs: Sequence[str], *, truncate: bool
) -> tuple[list[list[float]], int]:
    server = runner.server
    try:
        answer = await _whole(server, "/v1/embeddings", {"input": inputs})
    except Refusal as refusal:
        if not any(sign in refusal.message for sign in _TOO_LONG):
            raise
        if not truncate:
            raise Refusal(400, "the input length exceeds the context length") from refusal
        # A model that does not attend causally must see a text in one batch, others may take several.
        launch = runner.launch
        limit = (launch.num_batch if "batch" in refusal.message else launch.num_ctx) - 1
        cut = [(await _tokens(server, text, add_special=True))[:limit] for text in inputs]
        answer = await _whole(server, "/v1/embeddings", {"input": cut})
    return [row["embedding"] for row in answer["data"]], answer["usage"]["prompt_tokens"]
