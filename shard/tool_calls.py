"""Finds tool calls in a model's text, piece by piece as it comes (Ollama's ``tools/tools.go``).

A template shows what comes before a call (``ChatTemplate.tool_tag``). After that the name of one of the
tools and the first JSON object that can be its arguments make a call, in whatever way they are written.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from shard.thinking import overlap

_BRACKETS = {"{": "}", "[": "]"}
_ID_LETTERS = string.ascii_lowercase + string.digits


def call_id() -> str:
    """Return an id for a tool call, as Ollama makes them."""
    return "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(8))


def preserved_tokens(tag: str) -> list[str]:
    """Return the special tokens that llama-server must leave in the text for the tag to be seen there."""
    if tag in _BRACKETS:
        return []
    closing = {"[": "]", "<": ">"}.get(tag[0])
    end = tag.find(closing) if closing else 0
    return [tag[: end + 1] if end > 0 else tag]


class ToolCallParser:
    """Takes an answer's text and gives calls and the rest apart."""

    def __init__(self, tag: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tag = tag
        self._names = [str((tool.get("function") or {}).get("name") or "") for tool in tools]
        self._held = ""
        self._tagged = False
        self._over = False
        self._found = 0

    def add(self, text: str) -> tuple[list[dict[str, Any]], str]:
        """Return the calls that ``text`` completes, and what of it is no call."""
        if self._over:
            return [], text
        self._held += text
        content = ""
        if not self._tagged:
            content = self._before_tag()
            if not self._tagged:
                return [], content
        calls = list(self._calls())
        if self._is_closed():
            # A lone bracket opened something else: it was plain text if it held no call.
            self._over = True
            held, self._held = self._held, ""
            content += "" if self._found else held
        return calls, content

    def rest(self) -> str:
        """Return what was held back and is no call, once nothing more comes."""
        held, self._held = self._held, ""
        if self._found or (self._tagged and self._tag not in _BRACKETS):
            return ""
        return held

    def _before_tag(self) -> str:
        at = self._held.find(self._tag)
        self._tagged = at >= 0
        if at < 0:
            at = len(self._held) - overlap(self._held, self._tag)
        content, self._held = self._held[:at], self._held[at:]
        if self._tag in _BRACKETS and content.strip():
            # A bare bracket only begins a call where the answer begins with it.
            self._over, self._tagged = True, False
            content, self._held = content + self._held, ""
        return content

    def _calls(self) -> Iterator[dict[str, Any]]:
        while (found := _first_name(self._held, self._names)) is not None:
            name, name_end = found
            arguments, end = _arguments(self._held, name)
            if arguments is None:
                return
            self._held = self._held[max(end, name_end) :]
            yield {
                "id": call_id(),
                "function": {"index": self._found, "name": name, "arguments": arguments},
            }
            self._found += 1

    def _is_closed(self) -> bool:
        closing = _BRACKETS.get(self._tag)
        if closing is None:
            return False
        depth = 0
        for char in self._held:
            depth += (char == self._tag) - (char == closing)
            if char == closing and depth <= 0:
                return True
        return False


def _first_name(text: str, names: Sequence[str]) -> tuple[str, int] | None:
    """Return the tool named first, the longest at one place, and where its name ends."""
    # A name that the text ends in the middle of may become another one: "get" and "get_weather".
    if any(overlap(text, name) not in (0, len(name)) for name in names if name):
        return None
    found = [(at, -len(name), name) for name in names if name and (at := text.find(name)) >= 0]
    if not found:
        return None
    at, _, name = min(found)
    return name, at + len(name)


def _arguments(text: str, name: str) -> tuple[dict[str, Any] | None, int]:
    """Return the arguments for the tool ``name`` in the first JSON object of ``text``, and where it ends."""
    for start, end in _objects(text):
        try:
            data = orjson.loads(text[start:end])
        except orjson.JSONDecodeError:
            continue
        found = _find_arguments(data, name)
        return (data if found is None else found), end
    return None, 0


def _objects(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the outermost ``{…}`` of a text begin and end."""
    depth, start = 0, 0
    in_string = escaped = False
    for at, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif char == "{":
            start = at if depth == 0 else start
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                yield start, at + 1


def _find_arguments(data: Any, name: str) -> dict[str, Any] | None:
    """Return what lies under "arguments" or "parameters" beside the tool's name, or under that name."""
    if isinstance(data, list):
        return next((found for item in data if (found := _find_arguments(item, name)) is not None), None)
    if not isinstance(data, dict):
        return None
    is_call = "name" in data or name in data.values()
    keys = ("arguments", "parameters") if is_call else (name,)
    for key in keys:
        if (given := _as_object(data.get(key))) is not None:
            return given
    if is_call:
        return {}
    return _find_arguments(list(data.values()), name)


def _as_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
    return value if isinstance(value, dict) else None
