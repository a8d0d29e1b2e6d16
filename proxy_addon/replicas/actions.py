"""What may be done about a model in a node's memory, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Load:
    """Load ``model`` (canonical name) on ``node``."""

    name: ClassVar = "load"
    model: str
    node: str
    reason: str
    pinned: bool = False  #: to stay there for good


@dataclass(frozen=True, slots=True)
class Unload:
    """Let ``node`` give ``model`` up once it is idle."""

    name: ClassVar = "unload"
    model: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Tell ``node`` again that ``model``, which it has in memory, is to stay there."""

    name: ClassVar = "keep"
    model: str
    node: str
    reason: str


Action = Load | Unload | Keep
