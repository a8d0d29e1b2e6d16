"""The shapes of requests: what has another one is refused before a model is loaded for it.

As Go reads JSON for Ollama (``api/types.go``): null stands for a field that was left out, fields that nobody
knows are ignored, and no value is converted. What a value may be beyond its type is for who uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import TypeAdapter, ValidationError

from shard.translate import Refusal

Text = str | None
Flag = bool | None


class _Call(TypedDict, total=False):
    name: Text
    index: int | None
    arguments: dict[str, Any] | None


class _ToolCall(TypedDict, total=False):
    id: Text
    function: _Call | None


class _Message(TypedDict, total=False):
    role: Text
    content: Text
    thinking: Text
    tool_name: Text
    tool_call_id: Text
    images: list[str] | None
    tool_calls: list[_ToolCall] | None


class _Parameters(TypedDict, total=False):
    type: Text
    required: list[str] | None
    properties: dict[str, Any] | None


class _Function(TypedDict, total=False):
    name: Text
    description: Text
    parameters: _Parameters | None


class _Tool(TypedDict, total=False):
    type: Text
    function: _Function | None


class Chat(TypedDict, total=False):
    """``/api/chat``."""

    messages: list[_Message] | None
    tools: list[_Tool] | None
    stream: Flag
    truncate: Flag
    shift: Flag
    logprobs: Flag


class Generate(TypedDict, total=False):
    """``/api/generate``."""

    prompt: Text
    suffix: Text
    system: Text
    template: Text
    context: list[int] | None
    images: list[str] | None
    raw: Flag
    stream: Flag
    truncate: Flag
    shift: Flag
    logprobs: Flag


class Embed(TypedDict, total=False):
    """``/api/embed``."""

    truncate: Flag
    dimensions: int | None


class Embeddings(TypedDict, total=False):
    """``/api/embeddings``."""

    prompt: Text


class Conversation(TypedDict, total=False):
    """OpenAI's and Anthropic's chat routes, as far as anything is put before what the client says."""

    messages: list[dict[str, Any]] | None
    stream: Flag


_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    shape: TypeAdapter(shape) for shape in (Chat, Generate, Embed, Embeddings, Conversation)
}
_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
}


def check(body: Mapping[str, Any], shape: type) -> None:
    """Raise Refusal unless ``body`` has the ``shape``, one of this module's."""
    try:
        _ADAPTERS[shape].validate_python(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        wanted = _NAMES.get(first["type"], "of another type")
        raise Refusal(400, f"{place.removeprefix('.')} must be {wanted}") from error
