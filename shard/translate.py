"""Ollama's requests as llama-server's: pure functions on plain data.

The mapping is the one Ollama itself uses towards its bundled llama-server (``llm/llama_server.go``, v0.33);
:mod:`shard.replies` translates back. Every function that refuses raises :class:`Refusal`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shard.options import sampling_fields

MAX_TOP_LOGPROBS = 20


class Refusal(Exception):
    """A request that gets an error answer: HTTP status and the sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


# First bytes → MIME type, for the data URI that llama-server wants.
_IMAGE_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}


def chat_body(request: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions`` for an ``/api/chat`` request.

    ``options`` is what :func:`shard.options.resolve` returned. The upstream call always streams.
    """
    messages = request.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise Refusal(400, "messages must be a list of objects")
    body = sampling_fields(options) | {
        "messages": [_message(message) for message in messages],
        "stream": True,
        "cache_prompt": True,
    }
    if tools := request.get("tools"):
        body["tools"] = tools
    if (top := _top_logprobs(request)) is not None:
        body |= {"logprobs": True, "top_logprobs": max(top, 1)}
    if (think := request.get("think")) is not None:
        body["chat_template_kwargs"] = _think(think)
    if (schema := _format(request.get("format"))) is not None:
        body["response_format"] = (
            {"type": "json_object"}
            if schema == "json"
            else {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
        )
    return body


def generate_messages(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation that a non-raw ``/api/generate`` stands for: its system text and prompt."""
    system = request.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    user: dict[str, Any] = {"role": "user", "content": request.get("prompt") or ""}
    if request.get("images"):
        user["images"] = request["images"]
    return [*messages, user]


def completion_body(
    request: Mapping[str, Any], options: Mapping[str, Any], prompt: str | Sequence[int]
) -> dict[str, Any]:
    """Return the body for ``/completion`` for an ``/api/generate`` request whose prompt is rendered."""
    body = sampling_fields(options) | {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "stream": True,
        "cache_prompt": True,
        "return_tokens": True,
    }
    if (top := _top_logprobs(request)) is not None:
        body["n_probs"] = max(top, 1)
    if (schema := _format(request.get("format"))) is not None:
        # "{}" as a schema allows any JSON value; Ollama's format "json" promises an object.
        body["json_schema"] = {"type": "object"} if schema == "json" else schema
    return body


def infill_body(request: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for ``/infill`` for an ``/api/generate`` request with a ``suffix``."""
    body = completion_body(request, options, "")
    del body["prompt"]
    return body | {"input_prefix": request.get("prompt") or "", "input_suffix": request["suffix"]}


def render_template(template: str, *, system: str, prompt: str) -> str:
    """Return a request's own ``template`` with ``.System`` and ``.Prompt`` filled in.

    ``.Response`` and what follows it is where the model goes on. Raises Refusal for any other Go template
    action, for it would take Go's template engine to honour it.
    """
    fields = {".System": system, ".Prompt": prompt}
    text = re.split(r"\{\{-?\s*\.Response\s*-?\}\}", template)[0]
    for action in re.findall(r"\{\{.*?\}\}", text, re.DOTALL):
        if action.strip("{}- \t\n") not in fields:
            raise Refusal(400, f"template action {action} is not supported by this node")
    return re.sub(r"\{\{-?\s*(\.\w+)\s*-?\}\}", lambda match: fields[match[1]], text)


def embed_inputs(request: Mapping[str, Any]) -> list[str]:
    """Return the texts of an ``/api/embed`` request; an empty or missing input is no text at all."""
    given = request.get("input")
    if given is None or given == "":
        return []
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return given
    raise Refusal(400, "invalid input type")


def shorten(vector: Sequence[float], dimensions: int | None) -> list[float]:
    """Return the first ``dimensions`` of a unit vector, scaled to length one again (Matryoshka models)."""
    if not dimensions or dimensions >= len(vector):
        return list(vector)
    cut = vector[:dimensions]
    norm = math.sqrt(sum(x * x for x in cut)) or 1.0
    return [x / norm for x in cut]


def oldest_to_drop(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the message that is dropped first when a conversation is too long.

    That is the oldest which is neither a system message nor the last one; None if nothing may be dropped.
    """
    for index, message in enumerate(messages[:-1]):
        if message.get("role") != "system":
            return index
    return None


def surely_fits(messages: Sequence[Mapping[str, Any]], num_ctx: int) -> bool:
    """Return whether a conversation fits without counting tokens: no token is shorter than a byte.

    32 tokens a message are allowed for what the template adds around it.
    """
    text_bytes = sum(len(str(message.get("content") or "").encode()) + 32 for message in messages)
    return text_bytes < num_ctx


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": message.get("role") or "user"}
    for ours, theirs in (("tool_call_id", "tool_call_id"), ("tool_name", "name")):
        if message.get(ours):
            converted[theirs] = message[ours]
    if calls := message.get("tool_calls"):
        converted["tool_calls"] = [_tool_call(index, call) for index, call in enumerate(calls)]
    if thinking := message.get("thinking"):
        converted["reasoning_content"] = thinking
    content = message.get("content") or ""
    images = message.get("images") or []
    if not images:
        converted["content"] = content
        return converted
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if content else []
    parts += [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]
    converted["content"] = parts
    return converted


def _tool_call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    return {
        "id": call.get("id") or f"call_{index}",
        "index": function.get("index", index),
        "type": "function",
        # OpenAI's form carries the arguments as text, Ollama's as an object.
        "function": {
            "name": function.get("name", ""),
            "arguments": json.dumps(function.get("arguments") or {}),
        },
    }


def _data_uri(image: Any) -> str:
    try:
        start = base64.b64decode(image[:64] if len(image) >= 64 else image, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Refusal(400, "images must be base64-encoded strings") from error
    mime = next((mime for magic, mime in _IMAGE_MAGIC.items() if start.startswith(magic)), "image/jpeg")
    return f"data:{mime};base64,{image}"


def _top_logprobs(request: Mapping[str, Any]) -> int | None:
    top = request.get("top_logprobs") or 0
    if not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise Refusal(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    return top if request.get("logprobs") else None


def _think(think: Any) -> dict[str, Any]:
    if isinstance(think, bool):
        return {"enable_thinking": think}
    if think in ("high", "medium", "low", "max"):
        return {"enable_thinking": True, "reasoning_effort": think}
    raise Refusal(
        400, f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)'
    )


def _format(given: Any) -> Any:
    if given is None or given == "":
        return None
    if given == "json" or isinstance(given, Mapping):
        return given
    raise Refusal(400, f'invalid format: {json.dumps(given)}; expected "json" or a valid JSON Schema object')
