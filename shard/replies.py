"""llama-server's answers as Ollama's: server-sent events in, Ollama's objects out, no socket in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from shard.thinking import ThinkingParser
from shard.tool_calls import ToolCallParser

NS_PER_MS = 1_000_000

CUT_STREAM = "an error was encountered while running the model: unexpected EOF"


class UpstreamError(Exception):
    """llama-server reported an error inside its stream; the message is its own."""


class SseReader:
    """Cuts a byte stream into the payloads of its ``data:`` lines; pings and ``[DONE]`` are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yield every event that ``chunk`` completes. Raises UpstreamError for an error event."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            value = value.removeprefix(b" ")
            if name == b"error":
                raise UpstreamError(error_message(value))
            if name != b"data" or value == b"[DONE]":
                continue
            event = orjson.loads(value)
            if event.get("error"):
                raise UpstreamError(error_message(value))
            yield event


def error_message(body: bytes) -> str:
    """Return the sentence in an error body of llama-server, or the body itself if it has another shape."""
    try:
        error = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace").strip()
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message", error)
    return error if isinstance(error, str) else json.dumps(error)


@dataclass(slots=True)
class Piece:
    """What one event adds to the answer."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Final:
    """How the answer ended, with llama-server's ``timings``."""

    done_reason: str
    timings: Mapping[str, Any]


class Reply(Protocol):
    """Takes the events of one answer in order; ``final`` is None until the answer is complete."""

    @property
    def final(self) -> Final | None:
        """How the answer ended."""

    def take(self, event: Mapping[str, Any]) -> Piece | None:
        """Return what ``event`` adds, None if nothing; raises UpstreamError for broken tool arguments."""


@dataclass(slots=True)
class _ToolCall:
    id: str = ""
    name: str = ""
    arguments: str = ""


class ChatReply:
    """Events of ``/v1/chat/completions``. Tool calls come in fragments and are given out once, whole."""

    def __init__(self, *, top_logprobs: bool = False) -> None:
        self.final: Final | None = None
        self._top = top_logprobs
        self._finish: str | None = None
        self._calls: dict[int, _ToolCall] = {}

    def take(self, event: Mapping[str, Any]) -> Piece | None:
        """Return what ``event`` adds; see :class:`Reply`."""
        piece = Piece()
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            piece.content += delta.get("content") or ""
            piece.thinking += delta.get("reasoning_content") or ""
            piece.logprobs += logprobs((choice.get("logprobs") or {}).get("content"), self._top)
            for fragment in delta.get("tool_calls") or ():
                self._gather(fragment)
            self._finish = choice.get("finish_reason") or self._finish
        # With include_usage the timings come after the finish reason, in an event without choices.
        if self._finish and "timings" in event:
            piece.tool_calls = self._whole_calls()
            self.final = Final("length" if self._finish == "length" else "stop", event["timings"])
        return piece if piece.content or piece.thinking or piece.tool_calls or piece.logprobs else None

    def _gather(self, fragment: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(fragment.get("index", 0), _ToolCall())
        function = fragment.get("function") or {}
        call.id += fragment.get("id") or ""
        call.name += function.get("name") or ""
        call.arguments += function.get("arguments") or ""

    def _whole_calls(self) -> list[dict[str, Any]]:
        whole = []
        for index, call in sorted(self._calls.items()):
            try:
                arguments = orjson.loads(call.arguments) if call.arguments.strip() else {}
            except orjson.JSONDecodeError as error:
                raise UpstreamError(
                    f'llama-server returned invalid tool call arguments for "{call.name}": {error}'
                ) from error
            function = {"index": index, "name": call.name, "arguments": arguments}
            whole.append({"id": call.id, "function": function})
        return whole


class CompletionReply:
    """Events of ``/completion`` and ``/infill``."""

    def __init__(self, *, top_logprobs: bool = False) -> None:
        self.final: Final | None = None
        self._top = top_logprobs

    def take(self, event: Mapping[str, Any]) -> Piece | None:
        """Return what ``event`` adds; see :class:`Reply`."""
        piece = Piece(
            content=event.get("content") or "",
            logprobs=logprobs(event.get("completion_probabilities"), self._top),
            tokens=event.get("tokens") or [],
        )
        if event.get("stop"):
            reason = "length" if event.get("stop_type") == "limit" else "stop"
            self.final = Final(reason, event.get("timings") or {})
        return piece if piece.content or piece.logprobs or piece.tokens else None


class RenderedReply:
    """Events of ``/completion`` for a prompt made here: thinking and tool calls are found in the text.

    With ``constrain`` the answer is to be of a format that the thinking before it is not: ``interrupted``
    turns true at the first text after the thinking, and :meth:`resume` takes the events of the run that
    goes on from ``thought`` under the format.
    """

    def __init__(
        self,
        *,
        thinking: ThinkingParser | None = None,
        tools: ToolCallParser | None = None,
        top_logprobs: bool = False,
        constrain: bool = False,
    ) -> None:
        self._inner = CompletionReply(top_logprobs=top_logprobs)
        self._top = top_logprobs
        self._thinking = thinking
        self._tools = tools
        self._constrain = constrain and thinking is not None
        self.thought = ""
        self.interrupted = False

    @property
    def final(self) -> Final | None:
        """How the answer ended."""
        return None if self.interrupted else self._inner.final

    def take(self, event: Mapping[str, Any]) -> Piece | None:
        """Return what ``event`` adds; see :class:`Reply`."""
        piece = self._inner.take(event) or Piece()
        ended = self._inner.final is not None
        text, piece.content = piece.content, ""
        if self._thinking is None:
            piece.content = text
        else:
            piece.thinking, piece.content = self._thinking.add(text)
            if ended:
                thinking, content = self._thinking.rest()
                piece.thinking += thinking
                piece.content += content
        self.thought += piece.thinking
        if self._constrain and self.thought and piece.content:
            self.interrupted = True
            return Piece(thinking=piece.thinking) if piece.thinking else None
        if self._tools is not None:
            piece.tool_calls, piece.content = self._tools.add(piece.content)
            if ended:
                piece.content += self._tools.rest()
        empty = not (piece.content or piece.thinking or piece.tool_calls or piece.logprobs or piece.tokens)
        return None if empty else piece

    def resume(self) -> None:
        """Go on with the events of another run, which says nothing but the answer."""
        self._inner = CompletionReply(top_logprobs=self._top)
        self._thinking, self._constrain, self.interrupted = None, False, False


def logprobs(given: list[dict[str, Any]] | None, with_top: bool) -> list[dict[str, Any]]:
    """Return token probabilities in Ollama's shape, alternatives only if they were asked for."""
    return [
        _token(entry)
        | ({"top_logprobs": [_token(top) for top in entry.get("top_logprobs") or ()]} if with_top else {})
        for entry in given or ()
    ]


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry.get("bytes")}


def chat_object(model: str, created_at: str, piece: Piece) -> dict[str, Any]:
    """Return a line of ``/api/chat``."""
    message: dict[str, Any] = {"role": "assistant", "content": piece.content}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.tool_calls:
        message["tool_calls"] = piece.tool_calls
    answer: dict[str, Any] = {"model": model, "created_at": created_at, "message": message, "done": False}
    if piece.logprobs:
        answer["logprobs"] = piece.logprobs
    return answer


def generate_object(model: str, created_at: str, piece: Piece) -> dict[str, Any]:
    """Return a line of ``/api/generate``."""
    answer: dict[str, Any] = {"model": model, "created_at": created_at, "response": piece.content}
    if piece.thinking:
        answer["thinking"] = piece.thinking
    answer["done"] = False
    if piece.logprobs:
        answer["logprobs"] = piece.logprobs
    return answer


def statistics(final: Final, total_ns: int, load_ns: int) -> dict[str, Any]:
    """Return the fields that make a line the last one; durations in ns.

    ``prompt_eval_count`` counts cached tokens too, ``prompt_eval_duration`` covers only the evaluated ones:
    that is what Ollama reports.
    """
    timings = final.timings
    return {
        "done": True,
        "done_reason": final.done_reason,
        "total_duration": total_ns,
        "load_duration": load_ns,
        "prompt_eval_count": timings.get("cache_n", 0) + timings.get("prompt_n", 0),
        "prompt_eval_duration": round(timings.get("prompt_ms", 0) * NS_PER_MS),
        "eval_count": timings.get("predicted_n", 0),
        "eval_duration": round(timings.get("predicted_ms", 0) * NS_PER_MS),
    }
