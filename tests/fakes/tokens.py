"""Answers that can be checked: every token of a fake's answer derives from the request.

An answer to a prompt that carries ``[[id:abc]]`` is `` abc-0 abc-1 abc-2 …``; without a marker the tag is a
hash of the prompt. ``[[n:20]]`` makes the answer 20 tokens long by itself (it ends with ``stop``, or with
``length`` if the client's limit is smaller). So a test sees every lost, doubled, reordered or foreign token.
"""

from __future__ import annotations

import hashlib
import re

DEFAULT_TOKENS = 8
THINKING_TOKENS = 3

_ID = re.compile(r"\[\[id:([A-Za-z0-9_.-]{1,80})\]\]")
_LENGTH = re.compile(r"\[\[n:(\d{1,7})\]\]")
_TOKEN = re.compile(r"^(?P<tag>[A-Za-z0-9_.-]+)-(?P<index>\d+)$")


class StreamError(AssertionError):
    """The text received is not the text that was asked for."""


def tag_of(prompt: str) -> str:
    """Return the tag of a prompt's answer: that of its last marker, else twelve digits of its sha256."""
    markers = _ID.findall(prompt)
    return str(markers[-1]) if markers else hashlib.sha256(prompt.encode()).hexdigest()[:12]


def length_of(prompt: str, limit: int | None) -> tuple[int, str]:
    """Return how many tokens the answer has and its ``done_reason``; ``limit`` is the client's, if any."""
    markers = _LENGTH.findall(prompt)
    natural = int(markers[-1]) if markers else None
    if limit is None or limit < 0:
        return (DEFAULT_TOKENS if natural is None else natural), "stop"
    if natural is not None and natural <= limit:
        return natural, "stop"
    return limit, "length"


def token(tag: str, index: int) -> str:
    """Return one token, with the space before it that tokens have."""
    return f" {tag}-{index}"


def thinking_tag(tag: str) -> str:
    """Return the tag of the thinking that comes before an answer tagged ``tag``."""
    return f"think.{tag}"


def expected_text(prompt: str, n: int | None = None) -> str:
    """Return the whole answer to ``prompt``; ``n`` is the client's limit of tokens."""
    tag, (count, _) = tag_of(prompt), length_of(prompt, n)
    return "".join(token(tag, i) for i in range(count))


def expected_thinking(prompt: str) -> str:
    """Return the thinking that precedes the answer to ``prompt`` when thinking was asked for."""
    tag = thinking_tag(tag_of(prompt))
    return "".join(token(tag, i) for i in range(THINKING_TOKENS))


def check_stream(text: str, prompt: str, n: int | None = None, *, complete: bool = True) -> int:
    """Return how many tokens of the answer to ``prompt`` are in ``text``, the joined text of a stream.

    ``complete=False`` accepts a prefix that ends between tokens. Raises :class:`StreamError` naming the
    first token that is lost, repeated, out of order or of another request.
    """
    tag, (count, _) = tag_of(prompt), length_of(prompt, n)
    words = text.split(" ")
    if words[0]:
        raise StreamError(f"the text begins with {words[0]!r} instead of the space before a token")
    for index, word in enumerate(words[1:]):
        found = _TOKEN.match(word)
        if not found:
            raise StreamError(f"token {index} of {tag}: {word!r} is no token")
        if found["tag"] != tag:
            raise StreamError(f"token {index} of {tag}: {word!r} belongs to another request")
        if int(found["index"]) != index:
            kind = "repeated or out of order" if int(found["index"]) < index else "preceded by a lost token"
            raise StreamError(f"token {index} of {tag}: {word!r} is {kind}")
    got = len(words) - 1
    if got > count or (complete and got != count):
        raise StreamError(f"{tag}: {got} tokens instead of {count}")
    return got
