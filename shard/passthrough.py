"""The OpenAI and Anthropic routes: llama-server speaks them itself, so requests and events go through.

What changes on the way: the model's name (looked up going in, the client's own spelling coming out), the
Modelfile's parameters, system text, messages and template, Ollama's sampling defaults where the client gave
none, and the shape of errors.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from agent.ollama import names
from shard import bodies
from shard.chat_template import ChatTemplate
from shard.llama_server import LlamaServer
from shard.models import ServedModel
from shard.node import NODE, UPSTREAM_ERRORS, error_body, json_answer, options_of, read_body
from shard.options import sampling_fields
from shard.prompts import Render, fitted, whole
from shard.replies import error_message
from shard.runners import Runner
from shard.translate import ANY_OBJECT, Refusal, generate_messages, response_format, shorten

# Ollama's OpenAI layer starts from these, not the model's (openai/openai.go); its Anthropic layer does not.
_OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
_ANTHROPIC = "/v1/messages"
_CHAT = "/v1/chat/completions"
_RESPONSES = "/v1/responses"
# Where a protocol's system text (None: among the messages) and its messages are.
_CONVERSATIONS = {
    _CHAT: (None, "messages"),
    _ANTHROPIC: ("system", "messages"),
    _RESPONSES: ("instructions", "input"),
}
_SHAPES = {_CHAT: bodies.Conversation, _ANTHROPIC: bodies.Conversation, "/v1/embeddings": bodies.Embed}

# A client's own limit may have any of these names; without one Ollama's open-ended budget applies.
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")

_SAMPLED = {_CHAT, "/v1/completions", _RESPONSES, _ANTHROPIC}


def upstream_body(path: str, ask: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama-server is sent for a client's body: Ollama's defaults under the client's values."""
    if path not in _SAMPLED:
        return dict(ask)
    defaults = sampling_fields(options) | ({} if path == _ANTHROPIC else _OPENAI_DEFAULTS)
    if ask.get("stop_sequences") or not defaults["stop"]:
        del defaults["stop"]
    if any(ask.get(limit) is not None for limit in _LIMITS):
        del defaults["n_predict"]
    given = {key: value for key, value in ask.items() if value is not None}
    if (wanted := _format(given)) is not None:
        given["response_format"] = wanted
    return defaults | given


def _format(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the response_format where llama-server would not take the client's word for it."""
    text = given.get("text")
    said = text.get("format") if isinstance(text, Mapping) else given.get("response_format")
    if not isinstance(said, Mapping):
        return None
    if said.get("type") == "json_object" and not said.get("schema"):
        return response_format(ANY_OBJECT)
    # The form of /v1/responses, which llama-server reads past.
    return response_format(said["schema"]) if text and isinstance(said.get("schema"), Mapping) else None


async def forward(request: web.Request) -> web.StreamResponse:
    """POST to one of llama-server's own routes."""
    node, ask = request.app[NODE], await read_body(request, _SHAPES.get(request.path))
    if request.path == _ANTHROPIC:
        _check_anthropic(ask)
    if request.path == _CHAT and not ask.get("messages"):
        raise Refusal(400, "[] is too short - 'messages'")
    model = node.models.find(ask.get("model"))
    _check_capabilities(model, ask, request.path)
    if model.projector is None and _shows(ask.get("messages") or ask.get("input")):
        raise Refusal(400, "this model is missing data required for image input")
    options = options_of({}, model)
    embeddings = request.path == "/v1/embeddings"
    async with node.lease(model, {}, options, embeddings=embeddings) as runner, runner.slots:
        if embeddings and ask.get("dimensions"):
            return await _shortened(runner, ask)
        asked = await _prompted(runner.server, model, request.path, ask, options)
        return await _relay(request, runner, ask, upstream_body(request.path, asked, options))


async def _prompted(
    server: LlamaServer,
    model: ServedModel,
    path: str,
    ask: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a client's body with what the Modelfile puts before it, and in the model's template."""
    template = model.rendering.template
    if path == "/v1/completions" and isinstance(ask.get("prompt"), str):
        suffix, asked = ask.get("suffix"), generate_messages(ask, model.system, model.messages)

        async def render(messages: Sequence[Mapping[str, Any]]) -> str:
            if template is None:
                body = {"messages": [dict(message) for message in messages]}
                return str((await whole(server, "/apply-template", body))["prompt"])
            return template.render_infill(ask["prompt"], suffix) if suffix else template.render(messages)

        prompt = await fitted(server, asked, render, options["num_ctx"])
        return {key: value for key, value in ask.items() if key != "suffix"} | {"prompt": prompt.ids}
    if path not in _CONVERSATIONS:
        return dict(ask)
    system_field, field = _CONVERSATIONS[path]
    asked = ask.get(field) or []
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list) or not all(_is_message(item) for item in asked):
        return dict(ask)  # calls of tools and their results, which only llama-server's own template takes
    system = ask.get(system_field) if system_field else None
    given = [*([{"role": "system", "content": system}] if system else []), *asked]
    messages = model.with_defaults(given)
    # llama-server makes the prompt from the GGUF's template; one that has none is handed the whole text.
    texts = [_text(message) for message in messages]
    if template is not None and model.header.chat_template is None and None not in texts:
        told = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        prompt = await fitted(server, told, _rendering(template), options["num_ctx"])
        rest = {key: value for key, value in ask.items() if key != system_field}
        return rest | {field: [{"role": "user", "content": prompt.text}]}
    if system_field and messages and messages[0].get("role") == "system":
        return {**ask, system_field: messages[0]["content"], field: messages[1:]}
    return {**ask, field: messages}


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type", "message") == "message"


async def _shortened(runner: Runner, ask: Mapping[str, Any]) -> web.Response:
    """Answer a request for embeddings of fewer dimensions, which llama-server does not know."""
    body = {"input": ask.get("input"), "encoding_format": "float"}
    answer = await whole(runner.server, "/v1/embeddings", body)
    for row in answer["data"]:
        row["embedding"] = shorten(row["embedding"], ask["dimensions"])
        if ask.get("encoding_format") == "base64":
            row["embedding"] = base64.b64encode(array("f", row["embedding"]).tobytes()).decode()
    return json_answer(answer | {"model": ask["model"]})


# What texts are called inside messages.
_TEXTS = {"text", "input_text", "output_text"}
# What images are called inside messages: OpenAI's chat, its responses, Anthropic's.
_IMAGES = {"image_url", "input_image", "image"}


def _shows(messages: Any) -> bool:
    """Whether an image is among what is said."""
    contents = [item.get("content") for item in messages or () if isinstance(item, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in _IMAGES for part in parts)


def _rendering(template: ChatTemplate) -> Render:
    async def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return template.render(messages)

    return render


def _text(message: Mapping[str, Any]) -> str | None:
    """Return a message's text, None if there is more to it than text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refusal(400, "a message's content must be a string or a list")
    if not all(isinstance(part, Mapping) and part.get("type") in _TEXTS for part in content):
        return None
    return "".join(str(part.get("text") or "") for part in content)


def _check_anthropic(ask: Mapping[str, Any]) -> None:
    if not isinstance(ask.get("max_tokens"), int) or ask["max_tokens"] <= 0:
        raise Refusal(400, "max_tokens is required and must be positive")
    if not ask.get("messages"):
        raise Refusal(400, "messages is required")


def _check_capabilities(model: ServedModel, ask: Mapping[str, Any], path: str) -> None:
    # llama-server would ignore the tools without a word.
    needed = {"tools": bool(ask.get("tools")), "completion": path in _SAMPLED}
    for capability, is_needed in needed.items():
        if is_needed and capability not in model.capabilities:
            raise Refusal(400, f"{names.parse(model.name)} does not support {capability}")
    if ask.get("tools") and model.header.chat_template is None:
        raise Refusal(
            400, f"{names.parse(model.name)} supports tools on /api/chat only: its GGUF has no template"
        )


async def _relay(
    request: web.Request, runner: Runner, ask: Mapping[str, Any], body: Mapping[str, Any]
) -> web.StreamResponse:
    server = runner.server
    # JSON escapes quotes inside strings, so these bytes can only be a member, never a part of the text.
    theirs = b'"model":' + orjson.dumps(runner.launch.alias)
    ours = b'"model":' + orjson.dumps(ask["model"])
    async with server.request("POST", request.path, body) as upstream:
        if upstream.status >= 400 or upstream.content_type != "text/event-stream":
            answer = b"".join([chunk async for chunk in server.chunks(upstream)])
            if upstream.status >= 400:
                raise Refusal(upstream.status, error_message(answer))
            return web.Response(
                body=answer.replace(theirs, ours), content_type="application/json", charset="utf-8"
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        rest = b""
        try:
            async for chunk in server.chunks(upstream):
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(event.replace(theirs, ours) + b"\n\n")
        except UPSTREAM_ERRORS as error:
            if not response.prepared:
                raise
            # Both protocols know an error event; what must not follow is a regular end.
            kind = b"event: error\n" if request.path == "/v1/messages" else b""
            data = orjson.dumps(error_body(request.path, 500, str(error)))
            await response.write(kind + b"data: " + data + b"\n\n")
        await response.write_eof()
        return response


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models; ``data`` is null when there is none, as with Ollama."""
    rows = [_row(model) for model in request.app[NODE].models]
    return json_answer({"object": "list", "data": rows or None})


async def one_model(request: web.Request) -> web.Response:
    """GET /v1/models/:model."""
    return json_answer(_row(request.app[NODE].models.find(request.match_info["model"])))


def _row(model: ServedModel) -> dict[str, Any]:
    created = int(model.modified_at.timestamp())
    return {"id": model.name, "object": "model", "created": created, "owned_by": "library"}
