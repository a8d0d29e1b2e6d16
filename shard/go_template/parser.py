"""Recursive descent over a template's tokens: one method for each thing in Go's grammar."""

from __future__ import annotations

from typing import Any

from shard.go_template.functions import ARITY, unsupported_verb
from shard.go_template.lexer import Token, Unsupported, tokens, unquote
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
    Node,
    Nodes,
    Operand,
    Pipe,
    Text,
    Tree,
    Variable,
)

_CONSTANTS = {"true": True, "false": False, "nil": None}
_BRANCHES = ("if", "range", "with")
_OPERANDS = frozenset({"string", "raw", "char", "number", "field", "dot", "variable", "name"})


def parse(source: str) -> Tree:
    """Return the tree of a template. Raises Unsupported for what this engine does not know."""
    return _Parser(list(tokens(source))).tree()


class _Parser:
    def __init__(self, stream: list[Token]) -> None:
        self._stream = stream
        self._at = 0
        self._defined: dict[str, Nodes] = {}
        self._called: list[str] = []
        self._variables = ["$"]
        self._loops = 0

    def tree(self) -> Tree:
        root, end = self._nodes()
        if end:
            raise Unsupported(f"the template has an unexpected {{{{{end}}}}}")
        for name in self._called:
            if name not in self._defined:
                raise Unsupported(f'the template calls "{name}", which it does not define')
        return Tree(root, self._defined)

    # The stream of tokens.

    def _peek(self) -> Token:
        return self._stream[self._at] if self._at < len(self._stream) else Token("end", "")

    def _next(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _skip_space(self) -> bool:
        spaced = self._peek().kind == "space"
        self._at += spaced
        return spaced

    def _accept(self, text: str) -> bool:
        """Step over the sign or word ``text`` if it comes next."""
        token = self._peek()
        found = token.kind in ("sign", "name") and token.text == text
        self._at += found
        return found

    def _close(self, where: str) -> None:
        self._skip_space()
        if self._next().kind != "close":
            raise Unsupported(f"the template has something unexpected after {where}")

    # Nodes.

    def _nodes(self) -> tuple[Nodes, str]:
        """Return nodes up to an ``end`` or ``else``, and which of them it was; "" at the template's end."""
        nodes: list[Node] = []
        while (token := self._next()).kind != "end":
            if token.kind == "text":
                nodes.append(Text(token.text))
                continue
            self._skip_space()
            word = self._peek().text if self._peek().kind == "name" else ""
            if word in ("end", "else"):
                self._at += 1
                return tuple(nodes), word
            node = self._statement(word)
            if node is not None:
                nodes.append(node)
        return tuple(nodes), ""

    def _statement(self, word: str) -> Node | None:
        if word in _BRANCHES:
            self._at += 1
            return self._branch(word)
        if word in ("break", "continue") and self._loops:
            self._at += 1
            self._close(word)
            return Jump(word)
        if word == "define":
            self._at += 1
            self._define(self._name())
            return None
        if word in ("template", "block"):
            self._at += 1
            return self._call(word)
        pipe = self._pipe()
        self._close("a pipeline")
        return Action(pipe)

    def _branch(self, kind: str) -> Branch:
        visible = len(self._variables)
        pipe = self._pipe(is_range=kind == "range")
        self._close(kind)
        self._loops += kind == "range"
        body, end = self._nodes()
        self._loops -= kind == "range"
        orelse: Nodes | None = None
        if end == "else":
            orelse = self._else(kind)
        elif not end:
            raise Unsupported(f"the template has no end for {kind}")
        else:
            self._close("end")
        del self._variables[visible:]
        return Branch(kind, pipe, body, orelse)

    def _else(self, kind: str) -> Nodes:
        self._skip_space()
        # "else if" and "else with" stand for a branch inside the else, and share its end.
        if kind != "range" and self._accept(kind):
            return (self._branch(kind),)
        self._close("else")
        orelse, end = self._nodes()
        if end != "end":
            raise Unsupported(f"the template has no end for {kind}")
        self._close("end")
        return orelse

    def _name(self) -> str:
        self._skip_space()
        token = self._next()
        if token.kind not in ("string", "raw"):
            raise Unsupported("the template names another one without quotes")
        return unquote(token.text) if token.kind == "string" else token.text[1:-1]

    def _define(self, name: str) -> None:
        self._close("define")
        outer, self._variables = self._variables, ["$"]
        loops, self._loops = self._loops, 0
        body, end = self._nodes()
        if end != "end":
            raise Unsupported(f'the template has no end for define "{name}"')
        self._close("end")
        self._variables, self._loops = outer, loops
        self._defined[name] = body

    def _call(self, word: str) -> Call:
        name = self._name()
        self._skip_space()
        pipe = None if self._peek().kind == "close" else self._pipe()
        if word == "block":
            self._define(name)
        else:
            self._close("template")
        self._called.append(name)
        return Call(name, pipe)

    # Pipelines.

    def _pipe(self, *, is_range: bool = False) -> Pipe:
        self._skip_space()
        variables, assigns = self._declaration(is_range)
        commands = [self._command()]
        while self._accept("|"):
            commands.append(self._command())
        if not assigns:
            self._variables += variables
        for command in commands[1:]:
            if not isinstance(command.operands[0], Function):
                raise Unsupported("the template pipes a value into something that is no function")
        for at, command in enumerate(commands):
            _check_call(command, piped=at > 0)
        return Pipe(tuple(commands), tuple(variables), assigns)

    def _declaration(self, is_range: bool) -> tuple[list[str], bool]:
        start, names = self._at, []
        while self._peek().kind == "variable":
            names.append(self._next().text)
            self._skip_space()
            if self._peek().text in (":=", "="):
                assigns = self._next().text == "="
                if assigns and (unknown := next((n for n in names if n not in self._variables), None)):
                    raise Unsupported(f"the template assigns to the undefined variable {unknown}")
                return names, assigns
            if not (is_range and len(names) == 1 and self._accept(",")):
                break
            self._skip_space()
        self._at = start
        return [], False

    def _command(self) -> Command:
        self._skip_space()
        operands: list[Operand] = []
        while True:
            token = self._peek()
            if not (token.kind in _OPERANDS or token.text == "("):
                break
            operands.append(self._operand())
            if not self._skip_space():
                break
        if not operands:
            raise Unsupported("the template has an empty pipeline")
        return Command(tuple(operands))

    def _operand(self) -> Operand:
        token = self._next()
        operand: Operand
        match token.kind:
            case "string":
                operand = Literal(unquote(token.text))
            case "raw":
                operand = Literal(token.text[1:-1])
            case "char":
                operand = Literal(ord(unquote(token.text)))
            case "number":
                operand = Literal(_number(token.text))
            case "dot":
                operand = Dot()
            case "field":
                return Field((token.text[1:], *self._fields()))
            case "variable":
                if token.text not in self._variables:
                    raise Unsupported(f"the template uses the undefined variable {token.text}")
                return Variable(token.text, self._fields())
            case "name" if token.text in _CONSTANTS:
                operand = Literal(_CONSTANTS[token.text])
            case "name":
                if token.text not in ARITY:
                    raise Unsupported(
                        f'the template calls the function "{token.text}", which is not supported'
                    )
                operand = Function(token.text)
            case _:
                operand = self._pipe()
                self._skip_space()
                if not self._accept(")"):
                    raise Unsupported("the template has an unclosed parenthesis")
        names = self._fields()
        if names and not isinstance(operand, Pipe):
            raise Unsupported("the template asks a constant for a field")
        return Chain(operand, names) if names else operand

    def _fields(self) -> tuple[str, ...]:
        names: list[str] = []
        while self._peek().kind == "field":
            names.append(self._next().text[1:])
        return tuple(names)


def _check_call(command: Command, *, piped: bool) -> None:
    first, *arguments = command.operands
    if not isinstance(first, Function):
        if arguments:
            raise Unsupported("the template gives arguments to something that is no function")
        if first == Literal(None):
            raise Unsupported("the template uses nil as a command")
        return
    for argument in arguments:
        if isinstance(argument, Function):
            _check_call(Command((argument,)), piped=False)
    least, most = ARITY[first.name]
    given = len(arguments) + piped
    if given < least or (most is not None and given > most):
        raise Unsupported(f'the template gives "{first.name}" {given} arguments')
    if first.name == "printf":
        form = arguments[0] if arguments else None
        if not isinstance(form, Literal) or not isinstance(form.value, str):
            raise Unsupported("the template computes the format of printf, which is not supported")
        if verb := unsupported_verb(form.value):
            raise Unsupported(f"the template uses %{verb} in printf, which is not supported")


def _number(text: str) -> Any:
    try:
        return int(text, 0)
    except ValueError:
        return int(text) if text.isdigit() else float(text)
