"""The tree that a template is read into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant: string, number, boolean or nil."""

    value: Any


@dataclass(frozen=True, slots=True)
class Dot:
    """``.``, the value at hand."""


@dataclass(frozen=True, slots=True)
class Field:
    """``.A.B``: fields of the value at hand."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """``$x.A.B``; ``$`` is the value that the template was called with."""

    name: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Function:
    """A function's name."""

    name: str


@dataclass(frozen=True, slots=True)
class Chain:
    """``(pipeline).A.B``."""

    operand: Operand
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """Operands side by side: a value, or a function and its arguments."""

    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pipe:
    """Commands joined by ``|``, whose result may go to variables: ``$x := …``, ``$x = …``."""

    commands: tuple[Command, ...]
    variables: tuple[str, ...] = ()
    assigns: bool = False


Operand = Literal | Dot | Field | Variable | Function | Chain | Pipe


@dataclass(frozen=True, slots=True)
class Text:
    """What stands outside of ``{{ }}``, trimmed."""

    text: str


@dataclass(frozen=True, slots=True)
class Action:
    """A pipeline whose value is printed, unless it goes to a variable."""

    pipe: Pipe


@dataclass(frozen=True, slots=True)
class Branch:
    """``if``, ``with`` or ``range``; ``orelse`` is None where there is no else."""

    kind: str
    pipe: Pipe
    body: Nodes
    orelse: Nodes | None = None


@dataclass(frozen=True, slots=True)
class Jump:
    """``break`` or ``continue``."""

    kind: str


@dataclass(frozen=True, slots=True)
class Call:
    """``{{ template "name" pipeline }}``."""

    name: str
    pipe: Pipe | None


Node = Text | Action | Branch | Jump | Call
Nodes = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A template and those that it defines."""

    root: Nodes
    defined: dict[str, Nodes] = field(default_factory=dict)
