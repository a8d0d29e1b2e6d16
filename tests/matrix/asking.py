"""What the client sends in an exchange, and how its answer is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson

from tests.matrix.cells import Exchange
from tests.matrix.client import Seen
from tests.matrix.expectation import TOKENS
from tests.proxy.asks import BY_NAME, Heard, Way

LIMIT = 2 * TOKENS  #: of an answer, so that the proxy expects a short one
LARGE_BYTES = 20 << 20
LARGE = b"A" * LARGE_BYTES  #: an image in base64, or a blob
DIGEST = f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
_HOLE = "%image%"
_WAYS: Mapping[tuple[str, bool], Way] = {
    ("native", True): BY_NAME["chat"],
    ("native", False): BY_NAME["chat-whole"],
    ("openai", True): BY_NAME["openai"],
    ("openai", False): BY_NAME["openai-whole"],
    ("anthropic", True): BY_NAME["anthropic"],
    ("anthropic", False): BY_NAME["anthropic-whole"],
}
_LONG_BYTES = 1 << 20  #: a piece that is longer is (part of) a long line


def way(exchange: Exchange) -> Way:
    """How a prompt is asked in ``exchange``."""
    return _WAYS[exchange.protocol, exchange.stream]


def path(exchange: Exchange) -> str:
    """Where it is sent."""
    return f"/api/blobs/{DIGEST}" if exchange.upload else way(exchange).path


def prompt(tag: str) -> str:
    """A prompt whose answer is known."""
    return f"count [[id:{tag}]] [[n:{TOKENS}]]"


def body(exchange: Exchange, model: str, tag: str) -> bytes:
    """The request's body."""
    if exchange.upload:
        return LARGE
    asked = way(exchange).body(prompt(tag))
    asked["model"] = model
    native = exchange.protocol == "native"
    asked |= {"options": {"num_predict": LIMIT}} if native else {"max_tokens": LIMIT}
    if exchange.body == "20 MB":
        asked["messages"] = [_with_image(exchange, prompt(tag))]
    return orjson.dumps(asked).replace(_HOLE.encode(), LARGE)


def _with_image(exchange: Exchange, text: str) -> dict[str, Any]:
    """A message with an image, as each protocol has it."""
    if exchange.protocol == "native":
        return {"role": "user", "content": text, "images": [_HOLE]}
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_HOLE}"}}
    if exchange.protocol == "anthropic":
        source = {"type": "base64", "media_type": "image/png", "data": _HOLE}
        image = {"type": "image", "source": source}
    return {"role": "user", "content": [{"type": "text", "text": text}, image]}


def heard(exchange: Exchange, seen: Seen, half_line: bool) -> Heard:
    """What a client of the protocol makes of ``seen``; ``half_line``: without the torn line before the error.

    Raises:
        ValueError: if it can make nothing of it.
    """
    found = Heard(seen.status or 0, seen.headers, seen.body, broken=not seen.ended)
    if exchange.upload:
        found.ended = seen.ended and found.status == 201
        found.error = orjson.loads(seen.body)["error"] if found.status >= 400 else None
        return found
    if half_line:
        separator = b"\n" if exchange.protocol == "native" else b"\n\n"
        pieces = seen.body.split(separator)
        torn = [piece for piece in pieces if len(piece) > _LONG_BYTES]
        if len(torn) != 1 or pieces.index(torn[0]) != len(pieces) - 3:  # the error, and what follows its end
            raise ValueError("there is no torn line just before the error")
        found.raw = separator.join(piece for piece in pieces if piece is not torn[0])
    try:
        way(exchange).read(found)
    except (orjson.JSONDecodeError, AssertionError, KeyError, TypeError, IndexError) as problem:
        raise ValueError(f"unreadable: {problem!r} in {seen.body[:80]!r} … {seen.body[-200:]!r}") from problem
    return found
