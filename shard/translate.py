"""Ollama's requests as llama-server's: pure functions on plain data.

The mapping is the one Ollama itself uses towards its bundled llama-server (``llm/llama_server.go``, v0.33);
:mod:`shard.replies` translates back. Every function that refuses raises :class:`Refusal`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shard.options import sampling_fields

MAX_TOP_LOGPROBS = 20

# What an image is taken to cost while a conversation is cut to the context (server/prompt.go).
IMAGE_TOKENS = 768

THINK_LEVELS = ("high", "medium", "low", "max")

# What Ollama's format "json" and OpenAI's "json_object" promise. llama-server (b10434) constrains nothing for
# a json_object without a schema, and takes "{}" as a schema for any JSON value.
ANY_OBJECT = {"type": "object"}

TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, "
    "adjust the context length in settings, or use a model with a longer context length"
)


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
}
# What the first 12 bytes of sound hold (llm/media.go), and llama-server's name for it.
_AUDIO_MAGIC = {b"WAVE": "wav", b"ID3": "mp3"}


def chat_body(request: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions`` for an ``/api/chat`` request.

    ``options`` is what :func:`shard.options.resolve` returned. The upstream call always streams.
    """
    body = sampling_fields(options) | {
        "messages": [_message(message) for message in messages_of(request)],
        "stream": True,
        "cache_prompt": True,
    }
    if tools := request.get("tools"):
        body["tools"] = tools
    if (top := _top_logprobs(request)) is not None:
        body |= {"logprobs": True, "top_logprobs": max(top, 1)}
    if (think := think_of(request)) is not None:
        level = {"reasoning_effort": think} if isinstance(think, str) else {}
        body["chat_template_kwargs"] = {"enable_thinking": bool(think)} | level
    if (schema := _format(request.get("format"))) is not None:
        body["response_format"] = response_format(schema)
    return body


def messages_of(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the messages of an ``/api/chat`` request. Raises Refusal if they are none."""
    messages = request.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise Refusal(400, "messages must be a list of objects")
    return messages


def generate_messages(
    request: Mapping[str, Any], system: str | None = None, messages: Sequence[Mapping[str, Any]] = ()
) -> list[Mapping[str, Any]]:
    """Return the conversation that a non-raw ``/api/generate`` stands for: its system text and prompt.

    ``system`` and ``messages`` are the Modelfile's; the messages do not come again before a ``context``.
    """
    system = request.get("system") or system
    before = () if request.get("context") else messages
    user: dict[str, Any] = {"role": "user", "content": request.get("prompt") or ""}
    if request.get("images"):
        user["images"] = request["images"]
    return [*([{"role": "system", "content": system}] if system else []), *before, user]


def completion_body(
    request: Mapping[str, Any], options: Mapping[str, Any], prompt: str | Sequence[int] | Mapping[str, Any]
) -> dict[str, Any]:
    """Return the body for ``/completion``; ``prompt`` is text, tokens or :func:`multimodal_prompt`."""
    body = sampling_fields(options) | {
        "prompt": prompt if isinstance(prompt, str | Mapping) else list(prompt),
        "stream": True,
        "cache_prompt": True,
        "return_tokens": True,
    }
    if (top := _top_logprobs(request)) is not None:
        body["n_probs"] = max(top, 1)
    if (schema := _format(request.get("format"))) is not None:
        body["json_schema"] = schema
    return body


def infill_body(request: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for ``/infill`` for an ``/api/generate`` request with a ``suffix``."""
    body = completion_body(request, options, "")
    del body["prompt"]
    return body | {"input_prefix": request.get("prompt") or "", "input_suffix": request["suffix"]}


def tagged_images(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Return a conversation with the tag ``[img-N]`` where its images belong, and the images, base64.

    A text may say where with ``[img]``; else an image stands before its message's text.
    """
    tagged: list[Mapping[str, Any]] = []
    images: list[str] = []
    for message in messages:
        before, text = "", message.get("content") or ""
        for image in message.get("images") or ():
            tag = image_tag(len(images))
            images.append(_checked_image(image))
            if "[img]" in text:
                text = text.replace("[img]", tag, 1)
            else:
                before += tag
        tagged.append(dict(message) | {"content": before + text})
    return tagged, images


def image_tag(index: int) -> str:
    """Return what stands for an image in a rendered prompt."""
    return f"[img-{index}]"


def multimodal_prompt(text: str, images: Sequence[str], marker: str) -> dict[str, Any]:
    """Return llama-server's form of a prompt with images; ``marker`` is what its process puts for each."""
    for index in range(len(images)):
        text = text.replace(image_tag(index), marker, 1)
    return {"prompt_string": text, "multimodal_data": list(images)}


def shrinking(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield a conversation, then again with more and more of its oldest messages left out.

    System messages and the last message always stay; a tool's result never loses the call that it answers.
    """
    start = -1
    for index in range(max(1, len(messages))):
        cut = _tool_block_start(messages, index)
        if cut == start or (index and messages[index - 1].get("role") == "system"):
            continue
        start = cut
        kept = [message for message in messages[:cut] if message.get("role") == "system"]
        yield [*kept, *messages[cut:]]


def _tool_block_start(messages: Sequence[Mapping[str, Any]], index: int) -> int:
    start = index
    while start > 0 and start < len(messages) and messages[start].get("role") == "tool":
        start -= 1
    calls = start < index and messages[start].get("role") == "assistant" and messages[start].get("tool_calls")
    return start if calls else index


def cut_middle(prompt: Sequence[int], num_ctx: int, num_keep: int, *, has_bos: bool) -> list[int]:
    """Return a prompt that leaves room in the context: its first ``num_keep`` tokens and its end.

    As Ollama does it where the context may shift: half of what is not kept is freed for the answer.
    """
    most = num_ctx - 1
    if len(prompt) <= most:
        return list(prompt)
    keep = min((len(prompt) if num_keep < 0 else num_keep) + has_bos, most)
    limit = num_ctx - max((num_ctx - keep) // 2, 1)
    return [*prompt[:keep], *prompt[len(prompt) - (limit - keep) :]]


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
    if not dimensions or not 0 < dimensions < len(vector):
        return list(vector)
    cut = vector[:dimensions]
    norm = math.sqrt(sum(x * x for x in cut)) or 1.0
    return [x / norm for x in cut]


def surely_fits(messages: Sequence[Mapping[str, Any]], num_ctx: int) -> bool:
    """Return whether a conversation fits without counting tokens: no token is shorter than a byte.

    32 tokens a message are allowed for what the template adds around it.
    """
    if any(message.get("images") or message.get("tool_calls") for message in messages):
        return False
    text_bytes = sum(len(str(message.get("content") or "").encode()) + 32 for message in messages)
    return text_bytes < num_ctx


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": message.get("role") or "user"}
    for ours, theirs in (("tool_call_id", "tool_call_id"), ("tool_name", "name")):
        if message.get(ours):
            converted[theirs] = message[ours]
    if calls := _listed(message, "tool_calls"):
        converted["tool_calls"] = [_tool_call(index, call) for index, call in enumerate(calls)]
    if thinking := message.get("thinking"):
        converted["reasoning_content"] = thinking
    content = message.get("content") or ""
    images = _listed(message, "images")
    if not images:
        converted["content"] = content
        return converted
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if content else []
    parts += [_media_part(image) for image in images]
    converted["content"] = parts
    return converted


def _listed(message: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = message.get(name) or []
    if not isinstance(found, list):
        raise Refusal(400, f"{name} of a message must be a list")
    return found


def _tool_call(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function") or {} if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise Refusal(400, "a tool call must be an object with a function")
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


def _media_part(image: Any) -> dict[str, Any]:
    start = base64.b64decode(_checked_image(image)[:64])
    if (
        form := next((form for magic, form in _AUDIO_MAGIC.items() if magic in start[:12]), None)
    ) is not None:
        return {"type": "input_audio", "input_audio": {"data": image, "format": form}}
    mime = next((mime for magic, mime in _IMAGE_MAGIC.items() if start.startswith(magic)), "image/jpeg")
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{image}"}}


def _checked_image(image: Any) -> str:
    try:
        start = base64.b64decode(image[:64] if len(image) >= 64 else image, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Refusal(400, "images must be base64-encoded strings") from error
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        # Ollama turns it into a PNG first; llama.cpp cannot read it.
        raise Refusal(400, "WebP images are not supported by this node; send PNG or JPEG")
    return str(image)


def _top_logprobs(request: Mapping[str, Any]) -> int | None:
    top = request.get("top_logprobs") or 0
    if not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise Refusal(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    return top if request.get("logprobs") else None


def think_of(request: Mapping[str, Any]) -> bool | str | None:
    """Return whether and how hard a model is to think, None if nothing was said. Raises Refusal."""
    think = request.get("think")
    if think is None or isinstance(think, bool) or think in THINK_LEVELS:
        return think
    raise Refusal(
        400, f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)'
    )


def response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return what keeps an answer of llama-server's chat route to ``schema``."""
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}


def _format(given: Any) -> Mapping[str, Any] | None:
    if given is None or given == "":
        return None
    if given == "json":
        return ANY_OBJECT
    if isinstance(given, Mapping):
        return given
    raise Refusal(400, f'invalid format: {json.dumps(given)}; expected "json" or a valid JSON Schema object')
