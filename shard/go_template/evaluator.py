"""Walks a template's tree and writes what it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from shard.go_template.functions import FUNCTIONS, LAZY, CallError
from shard.go_template.nodes import (
    Action,
    Branch,
    Call,
    Chain,
    Command,
    Dot,
    Field,
    Function,
    Jump,
    Literal,
    Nodes,
    Operand,
    Pipe,
    Text,
    Tree,
    Variable,
)
from shard.go_template.values import Record, printed, truth

# A template that calls itself without end is stopped before Python's own stack is.
_MAX_CALLS = 100


class TemplateError(ValueError):
    """A template met a value that it cannot take; the message is one sentence."""


class _Jump(Exception):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class _Scopes:
    """Variables, innermost last."""

    def __init__(self, root: Any) -> None:
        self._stack: list[tuple[str, Any]] = [("$", root)]

    def mark(self) -> int:
        return len(self._stack)

    def drop(self, mark: int) -> None:
        del self._stack[mark:]

    def declare(self, name: str, value: Any) -> None:
        self._stack.append((name, value))

    def assign(self, name: str, value: Any) -> None:
        self._stack[self._position(name)] = (name, value)

    def get(self, name: str) -> Any:
        return self._stack[self._position(name)][1]

    def _position(self, name: str) -> int:
        return next(at for at in reversed(range(len(self._stack))) if self._stack[at][0] == name)


def render(tree: Tree, data: Any) -> str:
    """Return the text of a template for ``data``. Raises TemplateError."""
    try:
        return "".join(_Walk(tree, data).nodes(tree.root, data))
    except CallError as error:
        raise TemplateError(str(error)) from error


class _Walk:
    def __init__(self, tree: Tree, root: Any, depth: int = 0) -> None:
        self._tree = tree
        self._depth = depth
        self._scopes = _Scopes(root)

    def nodes(self, nodes: Nodes, dot: Any) -> Iterator[str]:
        for node in nodes:
            match node:
                case Text(text):
                    yield text
                case Action(pipe):
                    value = self.pipe(pipe, dot)
                    if not pipe.variables:
                        yield printed(value)
                case Branch():
                    yield from self._branch(node, dot)
                case Jump(kind):
                    raise _Jump(kind)
                case Call(name, argument):
                    yield from self._call(name, self.pipe(argument, dot) if argument else None)

    def _branch(self, node: Branch, dot: Any) -> Iterator[str]:
        mark = self._scopes.mark()
        if node.kind == "range":
            yield from self._range(node, dot)
        else:
            value = self.pipe(node.pipe, dot)
            if truth(value):
                yield from self.nodes(node.body, value if node.kind == "with" else dot)
            elif node.orelse is not None:
                yield from self.nodes(node.orelse, dot)
        self._scopes.drop(mark)

    def _range(self, node: Branch, dot: Any) -> Iterator[str]:
        bare = Pipe(node.pipe.commands)
        empty = True
        for key, item in _items(self.pipe(bare, dot)):
            empty = False
            mark = self._scopes.mark()
            # One variable takes the element, two take the index and the element.
            values = (key, item) if len(node.pipe.variables) == 2 else (item,)
            for name, value in zip(node.pipe.variables, values, strict=False):
                (self._scopes.assign if node.pipe.assigns else self._scopes.declare)(name, value)
            try:
                yield from self.nodes(node.body, item)
            except _Jump as jump:
                if jump.kind == "break":
                    break
            finally:
                self._scopes.drop(mark)
        if empty and node.orelse is not None:
            yield from self.nodes(node.orelse, dot)

    def _call(self, name: str, argument: Any) -> Iterator[str]:
        if self._depth >= _MAX_CALLS:
            raise TemplateError(f'the template "{name}" calls itself without end')
        yield from _Walk(self._tree, argument, self._depth + 1).nodes(self._tree.defined[name], argument)

    def pipe(self, pipe: Pipe, dot: Any) -> Any:
        piped: tuple[Any, ...] = ()
        for command in pipe.commands:
            piped = (self._command(command, dot, piped),)
        [value] = piped
        for name in pipe.variables:
            (self._scopes.assign if pipe.assigns else self._scopes.declare)(name, value)
        return value

    def _command(self, command: Command, dot: Any, piped: tuple[Any, ...]) -> Any:
        first, *arguments = command.operands
        if not isinstance(first, Function):
            return self._operand(first, dot)
        if first.name in LAZY:
            return self._lazy(first.name, arguments, dot, piped)
        values = [self._operand(argument, dot) for argument in arguments]
        return FUNCTIONS[first.name](*values, *piped)

    def _lazy(self, name: str, arguments: Iterable[Operand], dot: Any, piped: tuple[Any, ...]) -> Any:
        value: Any = None
        for argument in arguments:
            value = self._operand(argument, dot)
            if truth(value) is (name == "or"):
                return value
        return piped[0] if piped else value

    def _operand(self, operand: Operand, dot: Any) -> Any:
        match operand:
            case Literal(value):
                return value
            case Dot():
                return dot
            case Field(names):
                return _fields(dot, names)
            case Variable(name, names):
                return _fields(self._scopes.get(name), names)
            case Function():
                return self._command(Command((operand,)), dot, ())
            case Chain(inner, names):
                return _fields(self._operand(inner, dot), names)
            case Pipe():
                mark = self._scopes.mark()
                value = self.pipe(operand, dot)
                self._scopes.drop(mark)
                return value


def _fields(value: Any, names: Iterable[str]) -> Any:
    for name in names:
        if isinstance(value, Record):
            if name not in value.fields:
                raise TemplateError(f"can't evaluate field {name} in a value that has no such field")
            value = value.fields[name]
        elif isinstance(value, dict):
            # Ollama reads templates with missingkey=zero.
            value = value.get(name)
        elif value is None:
            raise TemplateError(f"nil pointer evaluating interface {{}}.{name}")
        else:
            raise TemplateError(f"can't evaluate field {name} in type {type(value).__name__}")
    return value


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    match value:
        case None:
            return
        case dict():
            yield from sorted(value.items())
        case list() | tuple():
            yield from enumerate(value)
        case int() if not isinstance(value, bool):
            yield from ((at, at) for at in range(value))
        case _:
            raise TemplateError(f"range can't iterate over {printed(value)}")
