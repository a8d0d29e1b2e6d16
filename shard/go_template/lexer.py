"""Cuts a template into text and the tokens of its actions."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

# What Go's lexer calls white space (text/template/parse/lex.go).
SPACE = " \t\r\n"

# One token each; the order decides where two could match.
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<raw>`[^`]*`)
      | (?P<char>'(?:[^'\\\n]|\\.)+')
      | (?P<number>[+-]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+
                     |(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?))
      | (?P<field>\.[^\W\d]\w*)
      | (?P<dot>\.)
      | (?P<variable>\$\w*)
      | (?P<name>[^\W\d]\w*)
      | (?P<sign>:=|[=|(),])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


class Unsupported(ValueError):
    """A template that this engine cannot honour, or that is malformed; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Token:
    """``kind`` is a group of the token pattern, or "text", "open" and "close" around an action."""

    kind: str
    text: str


def tokens(source: str) -> Iterator[Token]:
    """Yield a template's tokens. Raises Unsupported if an action is malformed."""
    at, trims_next = 0, False
    while at < len(source):
        opening = source.find("{{", at)
        text = source[at:] if opening < 0 else source[at:opening]
        begin = opening + 2
        trims_here = opening >= 0 and _trims(source, begin)
        if trims_next:
            text = text.lstrip(SPACE)
        if trims_here:
            text = text.rstrip(SPACE)
            begin += 1
        if text:
            yield Token("text", text)
        if opening < 0:
            return
        comment = begin + (len(source[begin:]) - len(source[begin:].lstrip(SPACE)) if trims_here else 0)
        if source.startswith("/*", comment):
            at, trims_next = _skip_comment(source, comment)
            continue
        yield Token("open", "{{")
        at, trims_next = yield from _action(source, begin)
        yield Token("close", "}}")


def _trims(source: str, at: int) -> bool:
    # Only with white space after it is the dash a trim marker: {{-3}} is a number.
    return source.startswith("-", at) and source[at + 1 : at + 2] in tuple(SPACE)


def _closing(source: str, at: int) -> tuple[int, bool] | None:
    """Return where the action's end at ``at`` ends and whether it trims, None if there is none."""
    if source.startswith("}}", at):
        return at + 2, False
    if source.startswith("-}}", at) and source[at - 1] in SPACE:
        return at + 3, True
    return None


def _skip_comment(source: str, at: int) -> tuple[int, bool]:
    end = source.find("*/", at)
    if end < 0:
        raise Unsupported("the template has an unclosed comment")
    end += 2
    spaces = len(source[end:]) - len(source[end:].lstrip(SPACE))
    closing = _closing(source, end + spaces)
    if closing is None or (spaces and not closing[1]):
        raise Unsupported("a comment in the template ends before its closing delimiter")
    return closing


def _action(source: str, at: int) -> Generator[Token, None, tuple[int, bool]]:
    depth = 0
    while True:
        closing = _closing(source, at)
        if closing is not None:
            if depth:
                raise Unsupported("the template has an unclosed parenthesis")
            return closing
        match = _TOKEN.match(source, at)
        if match is None:
            raise Unsupported(_unreadable(source, at))
        kind, text = str(match.lastgroup), match[0]
        depth += {"(": 1, ")": -1}.get(text, 0) if kind == "sign" else 0
        if depth < 0:
            raise Unsupported("the template has an unexpected right parenthesis")
        yield Token(kind, text)
        at = match.end()


def _unreadable(source: str, at: int) -> str:
    if at >= len(source):
        return "the template has an unclosed action"
    return f"the template has an unexpected {json.dumps(source[at : at + 12])} in an action"


def unquote(text: str) -> str:
    """Return the value of a quoted Go string."""

    def value(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "xuU" and len(code) > 1:
            return chr(int(code[1:], 16))
        if code.isdigit() and len(code) == 3:
            return chr(int(code, 8))
        return _ESCAPED.get(code, code)

    return _ESCAPE.sub(value, text[1:-1])
