"""Where settings come from: a YAML file, variables, flags. Plain values, each with the place it came from.

Nothing here knows which settings exist; ``settings.py`` validates what is read here and uses the places to
say in one sentence where a mistake is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Key = tuple[str | int, ...]  #: ``("timeouts", "connect_s")``, ``("nodes", 0, "port")``


class SettingsError(Exception):
    """A mistake in the settings, as one sentence that names the place and the key."""


@dataclass(slots=True)
class Layer:
    """Nested values and, for each key, the words that say where it was set (``sollol.yaml:7``)."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)

    def put(self, key: tuple[str, ...], value: Any, place: str) -> None:
        """Set ``key``; what was known below it is forgotten.

        Raises:
            SettingsError: if a shorter key already has a plain value, so that nothing can be below it.
        """
        table = self.values
        for depth, part in enumerate(key[:-1], 1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise SettingsError(f"{place}: {dotted(key[:depth])} is a single setting")
        for old in [old for old in self.places if old[: len(key)] == key]:
            del self.places[old]
        table[key[-1]] = value
        self.places[key] = place

    def over(self, lower: Layer) -> Layer:
        """This layer laid over ``lower``: tables are merged, everything else is replaced whole."""
        return Layer(
            _merge(lower.values, self.values),
            {k: p for k, p in lower.places.items() if not _hidden(k, self.values)} | self.places,
        )

    def place(self, key: Key) -> str:
        """Where ``key``, the nearest key above it, or the first one below it was set; "" for a default."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return next((place for below, place in self.places.items() if below[: len(key)] == key), "")


def dotted(key: Iterable[str | int]) -> str:
    """``nodes[0].port`` for ``("nodes", 0, "port")``."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def from_file(path: Path) -> Layer:
    """The settings in a YAML file, with line numbers.

    Raises:
        SettingsError: if it cannot be read, is not YAML, names a key twice or is not a table of settings.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{path}: cannot be read: {why}") from exc
    try:
        values = YAML(typ="safe", pure=True).load(text)
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = (exc.problem or "cannot be understood").partition(" with value")[0]  # which may be a secret
        raise SettingsError(f"{path}{line}: not valid YAML: {problem}") from exc
    except YAMLError as exc:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc
    if values is None:
        return Layer()
    if not isinstance(values, dict):
        raise SettingsError(f"{path}:1: should be a table of settings, not {type(values).__name__}")
    layer = Layer(values)
    _note_lines(root, (), str(path), layer.places)
    return layer


def from_variables(variables: Mapping[str, str], prefix: str, foreign: re.Pattern[str]) -> Layer:
    """The settings in environment variables ``PREFIX_A__B``: ``__`` goes one level down.

    Variables that ``foreign`` matches belong to somebody else and are passed over.
    """
    layer = Layer()
    for name in sorted(variables):
        if name.startswith(prefix) and not foreign.match(name):
            key = tuple(name.removeprefix(prefix).lower().split("__"))
            layer.put(key, variables[name], f"${name}")
    return layer


def from_pairs(pairs: Iterable[str]) -> Layer:
    """The settings in ``key.sub=value`` arguments of ``--set``.

    Raises:
        SettingsError: if one has no ``=`` or an empty key.
    """
    layer = Layer()
    for pair in pairs:
        name, separator, value = pair.partition("=")
        key = tuple(name.strip().replace("-", "_").split("."))
        if not separator or not all(key):
            raise SettingsError(f"--set {pair}: expected key=value, such as timeouts.connect_s=5")
        layer.put(key, value, f"--set {name.strip()}")
    return layer


def _note_lines(
    node: Node, key: Key, file: str, places: dict[Key, str], above: tuple[Node, ...] = ()
) -> None:
    if any(node is other for other in above):
        raise SettingsError(f"{file}:{node.start_mark.line + 1}: {dotted(key)} contains itself")
    above = (*above, node)
    if isinstance(node, MappingNode):
        for name, value in node.value:
            inner = (*key, str(name.value))
            places[inner] = f"{file}:{name.start_mark.line + 1}"
            _note_lines(value, inner, file, places, above)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            places[(*key, index)] = f"{file}:{value.start_mark.line + 1}"
            _note_lines(value, (*key, index), file, places, above)


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for name, value in upper.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _hidden(key: Key, values: Any) -> bool:
    """Whether an upper layer with ``values`` replaces what a lower one had at ``key``."""
    for part in key:
        if not isinstance(values, dict):
            return True
        if part not in values:
            return False
        values = values[part]
    return not isinstance(values, dict)
