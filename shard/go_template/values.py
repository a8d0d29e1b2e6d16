"""Go's values as Python's: how they print, marshal, compare and count as true.

Strings, booleans, numbers, None, lists and dicts are themselves. What Ollama hands to a template as a
struct is a :class:`Record`; its map and slice types that print as JSON are :class:`JsonMap` and
:class:`JsonList`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

NO_VALUE = "<no value>"


class JsonMap(dict[str, Any]):
    """A map that prints as JSON."""


class JsonList(list[Any]):
    """A slice that prints as JSON."""


class Record:
    """A struct: only its fields can be asked for. It prints as the JSON of ``data``."""

    def __init__(self, fields: Mapping[str, Any], data: Any) -> None:
        self.fields = fields
        self.data = data


def truth(value: Any) -> bool:
    """Return whether Go's ``if`` takes the value for true."""
    if isinstance(value, Record):
        return True
    return bool(value)


def printed(value: Any) -> str:
    """Return what an action prints for a value."""
    return NO_VALUE if value is None else _formatted(value)


def _formatted(value: Any) -> str:
    match value:
        case str():
            return value
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case float():
            return go_float(value)
        case Record() | JsonMap() | JsonList():
            return go_json(value)
        case dict():
            pairs = (f"{key}:{_formatted(item)}" for key, item in sorted(value.items()))
            return f"map[{' '.join(pairs)}]"
        case list() | tuple():
            return f"[{' '.join(map(_formatted, value))}]"
    return str(value)


def go_float(value: float) -> str:
    """Return a float as Go's %v: the shortest digits, with an exponent below 1e-4 and from 1e6 on."""
    if math.isnan(value) or math.isinf(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    shortest = Decimal(repr(value)).normalize()
    if value and not -4 <= shortest.adjusted() < 6:
        return _scientific(shortest)
    return f"{shortest:f}"


def _json_float(value: float) -> str:
    shortest = Decimal(repr(value)).normalize()
    if value and not 1e-6 <= abs(value) < 1e21:
        return _scientific(shortest).replace("e-0", "e-")
    return f"{shortest:f}"


def _scientific(shortest: Decimal) -> str:
    sign, digits, _ = shortest.as_tuple()
    first, *rest = map(str, digits)
    fraction = f".{''.join(rest)}" if rest else ""
    return f"{'-' * sign}{first}{fraction}e{shortest.adjusted():+03d}"


def go_json(value: Any) -> str:
    """Return ``json.Marshal`` of a value: keys of maps sorted, no spaces, ``<``, ``>`` and ``&`` escaped."""
    match value:
        case Record():
            return "{" + ",".join(f"{go_json(key)}:{go_json(item)}" for key, item in value.data.items()) + "}"
        case dict():
            return "{" + ",".join(f"{go_json(key)}:{go_json(value[key])}" for key in sorted(value)) + "}"
        case list() | tuple():
            return "[" + ",".join(map(go_json, value)) + "]"
        case str():
            text = json.dumps(value, ensure_ascii=False)
            for char in "<>&\u2028\u2029":
                text = text.replace(char, f"\\u{ord(char):04x}")
            return text
        case float():
            return _json_float(value)
    return json.dumps(value)
