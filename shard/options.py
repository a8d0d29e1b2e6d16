"""Ollama's ``options`` and ``keep_alive``: what they mean, their defaults, and llama-server's names for them.

Ollama sends every sampling option with every request, so this does too: llama-server's own defaults differ
(top_p .95, min_p .05). Defaults: ``api.DefaultOptions`` of Ollama v0.33; error texts: ``Options.FromMap``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_KEEP_ALIVE_S = 300.0

# What Ollama chooses below 23 GiB of VRAM (server/routes.go); more would cost KV cache on every load.
DEFAULT_NUM_CTX = 4096

# Ollama's own minimum (server/sched.go). llama-server computes two tokens as it starts, and aborts where a
# batch has fewer.
MIN_NUM_CTX = MIN_NUM_BATCH = 4

# Of an embedding model, unless its context is smaller (llm/llama_server.go).
EMBEDDING_NUM_BATCH = 2048

# An open-ended generation still gets a budget, in context windows (llm/llama_server.go).
OPEN_ENDED_CONTEXTS = 10

Kind = Literal["integer", "float32", "boolean", "array"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its type, its default, and the llama-server field it becomes (None: a launch flag)."""

    kind: Kind
    default: Any
    field: str | None = None


OPTIONS: dict[str, Option] = {
    "num_predict": Option("integer", -1, "n_predict"),
    "num_keep": Option("integer", 4, "n_keep"),
    "seed": Option("integer", -1, "seed"),
    "temperature": Option("float32", 0.8, "temperature"),
    "top_k": Option("integer", 40, "top_k"),
    "top_p": Option("float32", 0.9, "top_p"),
    "min_p": Option("float32", 0.0, "min_p"),
    "typical_p": Option("float32", 1.0, "typical_p"),
    "repeat_last_n": Option("integer", 64, "repeat_last_n"),
    "repeat_penalty": Option("float32", 1.1, "repeat_penalty"),
    "presence_penalty": Option("float32", 0.0, "presence_penalty"),
    "frequency_penalty": Option("float32", 0.0, "frequency_penalty"),
    "stop": Option("array", (), "stop"),
    "num_ctx": Option("integer", 0),
    "num_batch": Option("integer", 512),
    "num_gpu": Option("integer", -1),
    "num_thread": Option("integer", 0),
}


def resolve(
    given: Mapping[str, Any] | None, context_length: int | None, *, embeds: bool = False
) -> dict[str, Any]:
    """Return every option's value for a request: what was given over Ollama's default.

    A model that only ``embeds`` sees a text in one batch, which is larger by default for that.

    ``num_ctx`` comes out positive and no larger than ``context_length`` (tokens the model was trained for).
    Unknown options are ignored, as Ollama does. Raises ValueError with Ollama's text for a wrong type.
    """
    values = {name: option.default for name, option in OPTIONS.items()}
    for name, value in (given or {}).items():
        if name in OPTIONS and value is not None:
            values[name] = _typed(name, OPTIONS[name].kind, value)
    num_ctx = max(values["num_ctx"], MIN_NUM_CTX) if values["num_ctx"] > 0 else DEFAULT_NUM_CTX
    values["num_ctx"] = min(num_ctx, context_length) if context_length else num_ctx
    if values["num_batch"] <= 0:
        values["num_batch"] = OPTIONS["num_batch"].default
    values["num_batch"] = max(values["num_batch"], MIN_NUM_BATCH)
    if embeds and (given or {}).get("num_batch") is None:
        values["num_batch"] = min(EMBEDDING_NUM_BATCH, values["num_ctx"])
    return values


def _typed(name: str, kind: Kind, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case "integer" if number and math.isfinite(value):
            return int(value)
        case "float32" if number:
            return float(value)
        case "boolean" if isinstance(value, bool):
            return value
        case "array" if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ValueError(f'option "{name}" must be of an array of strings')
        case "array" if isinstance(value, list):
            return value
    raise ValueError(f'option "{name}" must be of type {kind}')


def sampling_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return llama-server's sampling fields for resolved options, all of them, always.

    Negative or very long ``num_predict`` becomes :data:`OPEN_ENDED_CONTEXTS` context windows (llama-server
    refuses -2), ``repeat_last_n`` -1 becomes the context (refused as well).
    """
    fields = {option.field: values[name] for name, option in OPTIONS.items() if option.field}
    limit = OPEN_ENDED_CONTEXTS * values["num_ctx"]
    if not 0 <= fields["n_predict"] <= limit:
        fields["n_predict"] = limit
    if fields["repeat_last_n"] < 0:
        fields["repeat_last_n"] = values["num_ctx"]
    fields["stop"] = list(fields["stop"])
    return fields


_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)([^\d.]*)")


def keep_alive_s(value: Any) -> float | None:
    """Return how long a model stays loaded after its last request, in seconds: ``inf`` is for ever.

    None means that nothing was said. Numbers are seconds, strings Go durations ("5m", "1h30m"), negative
    means for ever. Raises ValueError with Go's text where Ollama would answer 400 ("-1" without a unit).
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"Unsupported type: '{type(value).__name__}'")
    seconds = _go_duration_s(value) if isinstance(value, str) else float(int(value)) if value >= 0 else value
    return math.inf if seconds < 0 else float(seconds)


def _go_duration_s(text: str) -> float:
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    if not rest:
        raise ValueError(f'time: invalid duration "{text}"')
    seconds, at = 0.0, 0
    while at < len(rest):
        part = _DURATION_PART.match(rest, at)
        if part is None:
            raise ValueError(f'time: invalid duration "{text}"')
        amount, unit = part.groups()
        if not unit:
            raise ValueError(f'time: missing unit in duration "{text}"')
        if unit not in _UNIT_S:
            raise ValueError(f'time: unknown unit "{unit}" in duration "{text}"')
        seconds += float(amount) * _UNIT_S[unit]
        at = part.end()
    return sign * seconds
