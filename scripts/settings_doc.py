"""Write the table of all settings in `docs/settings.md` from the model that reads them.

    python scripts/settings_doc.py

What stands outside of the two marks is written by hand and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from proxy_addon.settings import Address, ClientClass, NodeSettings, PinnedModel, Settings

DOC = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"

#: The end of a name → its unit; the first that fits.
UNITS = (("_per_s", "1/s"), ("_s", "s"), ("_bytes", "bytes"))


def table() -> str:
    """Every setting as Markdown, one table for each part of the tree."""
    parts: list[tuple[str, str, type[BaseModel]]] = [("", "The top of the tree.", Settings)]
    for name, info in Settings.model_fields.items():
        part = info.annotation
        if isinstance(part, type) and issubclass(part, BaseModel) and part is not Address:
            parts.append((name, part.__doc__ or "", part))
    for name, part in (("nodes[]", NodeSettings), ("clients[]", ClientClass), ("pin[]", PinnedModel)):
        parts.append((name, part.__doc__ or "", part))
    return "\n".join(_part(*part) for part in parts)


def renewed(text: str) -> str:
    """`text` with what is between the marks made anew."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOC.name} lacks {BEGIN} or {END}")
    return f"{head}{BEGIN}\n{table()}{END}{tail}"


def _part(name: str, about: str, model: type[BaseModel]) -> str:
    rows = [
        f"| `{key}` | {_default(key, info)} | {_unit(key)} | {_choices(info)}{info.description or ''} |"
        for key, info in model.model_fields.items()
        if not _is_part(info)
    ]
    title = f"### `{name}`" if name else "### Top level"
    head = "| setting | default | unit | meaning |\n|---|---|---|---|"
    return "\n".join([title, "", about, "", head, *rows, "", ""])


def _is_part(info: FieldInfo) -> bool:
    kind = info.annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Address


def _unit(key: str) -> str:
    return next((unit for ending, unit in UNITS if key.endswith(ending)), "")


def _default(key: str, info: FieldInfo) -> str:
    if key == "state_dir":
        return "`$XDG_STATE_HOME/sollol`"  # not this machine's
    if info.is_required():
        return "required"
    value = info.default
    if value is None or value in ((), frozenset(), {}):
        return "none"
    return f"`{_text(value)}`"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, int | float | str | Address | IPv4Network | IPv6Network):
        return str(value)
    raise TypeError(f"how should {value!r} be written in {DOC.name}?")


def _choices(info: FieldInfo) -> str:
    return "".join(f"{_either(values)}; " for values in _literals(info.annotation))


def _literals(kind: Any) -> Iterator[tuple[str, ...]]:
    values = get_args(kind)
    if values and all(isinstance(value, str) for value in values):
        yield values


def _either(values: tuple[str, ...]) -> str:
    return ", ".join(f"`{value}`" for value in values[:-1]) + f" or `{values[-1]}`"


if __name__ == "__main__":
    DOC.write_text(renewed(DOC.read_text("utf-8")), "utf-8")
