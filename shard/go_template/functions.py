"""The functions that a template may call: Go's own and Ollama's (``template/template.go``)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any

from shard.go_template.values import JsonList, Record, go_json, printed, truth

# The verbs of printf, after flags and width.
_VERB = re.compile(r"%([-+# 0]*)(\d*)(?:\.(\d+))?([a-zA-Z%])")
SUPPORTED_VERBS = frozenset("svdqt%")


class CallError(ValueError):
    """A function was called with what it cannot take; the message is Go's."""


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nil"
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float"
        case str():
            return "string"
    return "other"


def _eq(first: Any, *others: Any) -> bool:
    if not others:
        raise CallError("error calling eq: missing argument for comparison")
    return any(_same(first, other) for other in others)


def _same(one: Any, other: Any) -> bool:
    kinds = {_kind(one), _kind(other)}
    if len(kinds) > 1 and "nil" not in kinds:
        raise CallError("error calling eq: incompatible types for comparison")
    if kinds == {"other"}:
        raise CallError("error calling eq: non-comparable type")
    return bool(one == other)


def _less(one: Any, other: Any) -> bool:
    kinds = {_kind(one), _kind(other)}
    if len(kinds) > 1:
        raise CallError("error calling lt: incompatible types for comparison")
    if not kinds <= {"int", "float", "string"}:
        raise CallError("error calling lt: invalid type for comparison")
    return bool(one < other)


def _len(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list | tuple | dict):
        return len(value)
    raise CallError(f"error calling len: len of type {_go_type(value)}")


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, dict) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, str | list | tuple) and isinstance(key, int):
            items: Sequence[Any] = value.encode() if isinstance(value, str) else value
            if not 0 <= key < len(items):
                raise CallError(f"error calling index: index out of range: {key}")
            value = items[key]
        else:
            raise CallError(f"error calling index: can't index item of type {_go_type(value)}")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise CallError(f"error calling slice: can't slice item of type {_go_type(value)}")
    if wrong := [bound for bound in bounds if _kind(bound) != "int"]:
        raise CallError(f"error calling slice: cannot index slice/array with type {_go_type(wrong[0])}")
    items = value.encode() if isinstance(value, str) else value
    start, end = (*bounds, *(0, len(items))[len(bounds) :])[:2]
    if not 0 <= start <= end <= len(items):
        raise CallError(f"error calling slice: index out of range: {start}:{end}")
    part = items[start:end]
    if isinstance(part, bytes):
        return part.decode("utf-8", "replace")
    return JsonList(part) if isinstance(value, JsonList) else part


def _go_type(value: Any) -> str:
    return {"nil": "untyped nil", "float": "float64", "other": "interface {}"}.get(_kind(value), _kind(value))


def _print(*values: Any) -> str:
    # fmt.Sprint puts a space between two operands of which neither is a string.
    text = ""
    for at, value in enumerate(values):
        if at and not isinstance(value, str) and not isinstance(values[at - 1], str):
            text += " "
        text += "<nil>" if value is None else printed(value)
    return text


def _println(*values: Any) -> str:
    return " ".join("<nil>" if value is None else printed(value) for value in values) + "\n"


def _printf(form: str, *values: Any) -> str:
    rest = list(values)

    def fill(match: re.Match[str]) -> str:
        flags, width, precision, verb = match.groups()
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        text = _verb(verb, rest.pop(0))
        if precision and verb == "s":
            text = text[: int(precision)]
        fit = str.ljust if "-" in flags else str.rjust
        return fit(text, int(width or 0), "0" if "0" in flags and "-" not in flags and verb == "d" else " ")

    text = _VERB.sub(fill, form)
    if rest:
        extra = ", ".join(
            "<nil>" if value is None else f"{_go_type(value)}={printed(value)}" for value in rest
        )
        text += f"%!(EXTRA {extra})"
    return text


def _verb(verb: str, value: Any) -> str:
    kind = _kind(value)
    if verb == "v":
        return "<nil>" if value is None else printed(value)
    if value is None:
        return f"%!{verb}(<nil>)"
    if verb == "q" and kind == "string":
        return json.dumps(value, ensure_ascii=False)
    fits = {"s": kind in {"string", "other"}, "d": kind == "int", "t": kind == "bool", "q": False}[verb]
    return printed(value) if fits else f"%!{verb}({_go_type(value)}={printed(value)})"


def _typescript(value: Any) -> str:
    data = value.data if isinstance(value, Record) else None
    if data is None:
        return "any"
    if variants := data.get("anyOf"):
        return " | ".join(_typescript(variant) for variant in variants)
    kinds = data.get("type") or ["any"]
    return " | ".join(_TYPESCRIPT.get(kind, "any") for kind in ([kinds] if isinstance(kinds, str) else kinds))


_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}


def _today(*_: str) -> str:
    return date.today().isoformat()


def _yesterday(*_: str) -> str:
    return (date.today() - timedelta(days=1)).isoformat()


# ``and`` and ``or`` are the evaluator's: they leave arguments unevaluated.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "not": lambda value: not truth(value),
    "eq": _eq,
    "ne": lambda one, other: not _same(one, other),
    "lt": _less,
    "le": lambda one, other: _less(one, other) or _same(one, other),
    "gt": lambda one, other: not (_less(one, other) or _same(one, other)),
    "ge": lambda one, other: not _less(one, other),
    "len": _len,
    "index": _index,
    "slice": _slice,
    "print": _print,
    "println": _println,
    "printf": _printf,
    "json": go_json,
    "currentDate": _today,
    "yesterdayDate": _yesterday,
    "toTypeScriptType": _typescript,
}
LAZY = frozenset({"and", "or"})

# Smallest and largest number of arguments; None: any number.
ARITY: dict[str, tuple[int, int | None]] = {
    "not": (1, 1), "eq": (1, None), "ne": (2, 2), "lt": (2, 2), "le": (2, 2), "gt": (2, 2), "ge": (2, 2),
    "len": (1, 1), "index": (1, None), "slice": (1, 4), "print": (0, None), "println": (0, None),
    "printf": (1, None), "json": (1, 1), "currentDate": (0, None), "yesterdayDate": (0, None),
    "toTypeScriptType": (1, 1), "and": (1, None), "or": (1, None),
}  # fmt: skip


def unsupported_verb(form: str) -> str | None:
    """Return the first verb of a printf format that is not supported, None if all are."""
    return next((match[4] for match in _VERB.finditer(form) if match[4] not in SUPPORTED_VERBS), None)
