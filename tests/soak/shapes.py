"""The ways to ask, as a table: path, body, and where an answer has its text; and a reader of streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import orjson

from tests.fakes.engine import embedding, normalised
from tests.fakes.store import embedding_model
from tests.fakes.tokens import StreamError, check_stream

Protocol = Literal["native", "openai", "anthropic"]
Body = dict[str, Any]
MAX_TOKENS = 100_000  #: Anthropic's body must name a limit
DIMENSIONS = embedding_model().embedding_length


@dataclass(frozen=True)
class Shape:
    """One way to ask for one thing."""

    name: str
    protocol: Protocol
    path: str
    body: Callable[[str], Body]  #: of a prompt
    whole: Callable[[Any], Any]  #: the text (or vectors) of an answer that is not streamed
    piece: Callable[[Any], str] | None = None  #: the text of an object of a stream; None: it is not streamed
    embeds: bool = False

    def request(self, model: str, prompt: str) -> Body:
        """The body of a request."""
        stream = {} if self.embeds else {"stream": self.piece is not None}
        return {"model": model, **self.body(prompt), **stream}

    def check(self, answer: bytes, prompt: str) -> int:
        """How many tokens a whole answer has; raises StreamError if it is not the answer to ``prompt``."""
        try:
            got = self.whole(orjson.loads(answer))
        except (ValueError, LookupError, TypeError) as problem:
            raise StreamError(f"no answer of {self.path}: {answer[:200]!r}") from problem
        if not self.embeds:
            return check_stream(got, prompt)
        vector = embedding(prompt, DIMENSIONS)
        wanted = vector if self.path == "/api/embeddings" else normalised(vector)
        if got != wanted:
            raise StreamError(f"an embedding that is not that of {prompt[:60]!r}")
        return 0


def _messages(prompt: str) -> Body:
    return {"messages": [{"role": "user", "content": prompt}]}


def _claude(prompt: str) -> Body:
    return {**_messages(prompt), "max_tokens": MAX_TOKENS}


def _delta(event: Any) -> str:
    return str(event["choices"][0]["delta"].get("content") or "") if event["choices"] else ""


def _block(event: Any) -> str:
    return str(event["delta"]["text"]) if event["type"] == "content_block_delta" else ""


def _output(event: Any) -> str:
    return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""


def _both(
    name: str, protocol: Protocol, path: str, body: Callable[[str], Body], whole: Any, piece: Any
) -> tuple[Shape, Shape]:
    made = partial(Shape, protocol=protocol, path=path, body=body, whole=whole)
    return made(name=f"{name} whole"), made(name=f"{name} stream", piece=piece)


SHAPES: tuple[Shape, ...] = (
    *_both("chat", "native", "/api/chat", _messages, lambda a: a["message"]["content"],
           lambda p: p["message"]["content"]),
    *_both("generate", "native", "/api/generate", lambda p: {"prompt": p}, lambda a: a["response"],
           lambda p: p["response"]),
    *_both("OpenAI chat", "openai", "/v1/chat/completions", _messages,
           lambda a: a["choices"][0]["message"]["content"], _delta),
    *_both("OpenAI completion", "openai", "/v1/completions", lambda p: {"prompt": p},
           lambda a: a["choices"][0]["text"], lambda p: p["choices"][0]["text"]),
    *_both("OpenAI response", "openai", "/v1/responses", lambda p: {"input": p},
           lambda a: a["output"][0]["content"][0]["text"], _output),
    *_both("Anthropic", "anthropic", "/v1/messages", _claude, lambda a: a["content"][0]["text"], _block),
    Shape("embed", "native", "/api/embed", lambda p: {"input": p}, lambda a: a["embeddings"][0], embeds=True),
    Shape("old embeddings", "native", "/api/embeddings", lambda p: {"prompt": p}, lambda a: a["embedding"],
          embeds=True),
    Shape("OpenAI embeddings", "openai", "/v1/embeddings", lambda p: {"input": p},
          lambda a: a["data"][0]["embedding"], embeds=True),
)  # fmt: skip

#: What the last object of a whole stream is.
_ENDS: dict[str, Callable[[Any], bool]] = {
    "/api/chat": lambda p: p["done"],
    "/api/generate": lambda p: p["done"],
    "/v1/messages": lambda p: p["type"] == "message_stop",
    "/v1/responses": lambda p: p["type"] == "response.completed",
}


def error_text(protocol: Protocol, value: Any) -> str | None:
    """The sentence of an error in the shape of ``protocol``, None if ``value`` is none."""
    error = value.get("error") if isinstance(value, dict) else None
    if protocol == "native":
        return error if isinstance(error, str) and error else None
    if isinstance(value, dict) and (protocol == "anthropic") != (value.get("type") == "error"):
        return None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) and message else None


class Reading:
    """A stream as it comes: its text, and how it ended. Raises StreamError for what no stream may contain."""

    def __init__(self, shape: Shape) -> None:
        self.text = ""
        self.done = False
        self.error: str | None = None
        self._shape = shape
        self._rest = b""
        self._separator = b"\n" if shape.protocol == "native" else b"\n\n"

    def feed(self, data: bytes) -> None:
        """Take what has come."""
        *parts, self._rest = (self._rest + data).split(self._separator)
        for part in parts:
            if self.done or self.error:
                raise StreamError(f"{part[:100]!r} after the end of the stream")
            self._take(part)

    def end(self) -> None:
        """No more will come."""
        if self._rest:
            raise StreamError(f"the stream ends with half an object: {self._rest[:100]!r}")

    def _take(self, part: bytes) -> None:
        shape = self._shape
        if shape.protocol != "native":
            [part] = [line[6:] for line in part.split(b"\n") if line.startswith(b"data: ")] or [b""]
            if part == b"[DONE]":
                self.done = True
                return
        try:
            value = orjson.loads(part)
            self.error = error_text(shape.protocol, value)
            if self.error is None:
                if value.get("error") is not None:
                    raise ValueError("an error of another protocol")
                assert shape.piece is not None
                self.text += shape.piece(value)
                self.done = bool(_ENDS.get(shape.path, lambda _: False)(value))
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise StreamError(f"{part[:100]!r} is no object of {shape.path}") from problem
