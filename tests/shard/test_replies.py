import json
from typing import Any

import pytest

from shard.replies import (
    ChatReply,
    CompletionReply,
    Final,
    Piece,
    RenderedReply,
    SseReader,
    UpstreamError,
    chat_object,
    generate_object,
    statistics,
)
from shard.thinking import ThinkingParser
from shard.tool_calls import ToolCallParser

TIMINGS = {"cache_n": 3, "prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 2, "predicted_ms": 0.25}


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def delta(finish: str | None = None, **given: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": given, "finish_reason": finish}]}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_survive_any_cut_of_the_bytes(size: int) -> None:
    raw = sse({"a": "ä"}) + b": ping\n\n" + (sse({"b": 2}) + b"data: [DONE]\n\n").replace(b"\n", b"\r\n")
    reader = SseReader()
    seen = [event for at in range(0, len(raw), size) for event in reader.feed(raw[at : at + size])]
    assert seen == [{"a": "ä"}, {"b": 2}]


@pytest.mark.parametrize(
    "raw", [sse({"error": {"code": 500, "message": "boom"}}), b'error: {"code":500,"message":"boom"}\n\n']
)
def test_an_error_event_is_an_error(raw: bytes) -> None:
    with pytest.raises(UpstreamError, match=r"^boom$"):
        list(SseReader().feed(raw))


def test_text_and_thinking_pass_piece_by_piece() -> None:
    reply = ChatReply()
    events = [
        delta(role="assistant", content=None),
        delta(reasoning_content="hm"),
        delta(content="a"),
        delta(finish="stop") | {"timings": TIMINGS},
    ]
    assert [reply.take(event) for event in events] == [None, Piece(thinking="hm"), Piece(content="a"), None]
    assert reply.final == Final("stop", TIMINGS)


def test_timings_may_come_after_the_finish_reason() -> None:
    reply = ChatReply()
    reply.take(delta(finish="length"))
    assert reply.final is None
    reply.take({"choices": [], "timings": TIMINGS})
    assert reply.final == Final("length", TIMINGS)


def test_tool_calls_are_gathered_and_given_once_with_objects() -> None:
    def fragment(index: int, **given: Any) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index} | given])

    reply = ChatReply()
    events = [
        fragment(0, id="x", function={"name": "f", "arguments": ""}),
        fragment(0, function={"arguments": '{"a"'}),
        fragment(1, id="y", function={"name": "g"}),
        fragment(0, function={"arguments": ":1}"}),
    ]
    assert [reply.take(event) for event in events] == [None] * 4
    piece = reply.take(delta(finish="tool_calls") | {"timings": TIMINGS})
    assert piece is not None
    assert piece.tool_calls == [
        {"id": "x", "function": {"index": 0, "name": "f", "arguments": {"a": 1}}},
        {"id": "y", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert reply.final == Final("stop", TIMINGS)
    assert chat_object("m", "t", piece)["message"]["tool_calls"] == piece.tool_calls


def test_broken_tool_arguments_are_an_error() -> None:
    reply = ChatReply()
    reply.take(delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{"}}]))
    with pytest.raises(UpstreamError, match='invalid tool call arguments for "f"'):
        reply.take(delta(finish="tool_calls") | {"timings": TIMINGS})


@pytest.mark.parametrize(("kind", "reason"), [("limit", "length"), ("eos", "stop"), ("word", "stop")])
def test_a_completion_ends_with_its_reason(kind: str, reason: str) -> None:
    reply = CompletionReply()
    assert reply.take({"content": "a", "tokens": [5], "stop": False}) == Piece(content="a", tokens=[5])
    assert reply.final is None
    assert reply.take({"content": "", "stop": True, "stop_type": kind, "timings": TIMINGS}) is None
    assert reply.final == Final(reason, TIMINGS)


def text(content: str, token: int) -> dict[str, Any]:
    return {"content": content, "tokens": [token], "stop": False}


STOPPED = {"content": "", "tokens": [], "stop": True, "stop_type": "eos", "timings": TIMINGS}


def test_rendered_answers_are_taken_apart_and_nothing_is_lost_at_the_end() -> None:
    tools = [{"function": {"name": "now"}}]
    reply = RenderedReply(
        thinking=ThinkingParser("<think>", "</think>"), tools=ToolCallParser("<tool_call>", tools)
    )
    said = (
        "<think>",
        "a",
        "</think>",
        "b",
        "<tool_call>",
        '{"name": "now", "arguments": {}}',
        "</tool_call>",
    )
    pieces = [reply.take(text(part, token)) for token, part in enumerate(said)]
    assert all(pieces), "every token is passed on"
    kept = [piece for piece in pieces if piece]
    assert [token for piece in kept for token in piece.tokens] == list(range(7))
    assert ["".join(piece.thinking for piece in kept), "".join(piece.content for piece in kept)] == ["a", "b"]
    [call] = [call for piece in kept for call in piece.tool_calls]
    assert call["function"] == {"index": 0, "name": "now", "arguments": {}}
    assert reply.take(STOPPED) is None
    assert reply.final == Final("stop", TIMINGS)
    held = RenderedReply(thinking=ThinkingParser("<think>", "</think>"))
    assert held.take(text("<thi", 1)) == Piece(tokens=[1])
    assert held.take(STOPPED) == Piece(content="<thi")


def test_an_answer_that_is_to_be_constrained_stops_after_its_thinking() -> None:
    reply = RenderedReply(thinking=ThinkingParser("<think>", "</think>"), constrain=True)
    assert reply.take(text("<think>so", 1)) == Piece(thinking="so", tokens=[1])
    assert reply.take(text("</think>{ and", 2)) is None
    assert reply.interrupted and reply.final is None and reply.thought == "so"
    reply.resume()
    assert reply.take(text('{"a": 1}', 3)) == Piece(content='{"a": 1}', tokens=[3])
    assert reply.take(STOPPED) is None
    assert reply.final == Final("stop", TIMINGS)


def test_logprobs_keep_alternatives_only_when_asked() -> None:
    entry = {"id": 1, "token": "a", "bytes": [97], "logprob": -0.5}
    event = {"content": "a", "completion_probabilities": [entry | {"top_logprobs": [entry]}]}
    bare = {"token": "a", "logprob": -0.5, "bytes": [97]}
    for wanted, expected in ((False, bare), (True, bare | {"top_logprobs": [bare]})):
        piece = CompletionReply(top_logprobs=wanted).take(event)
        assert piece is not None and piece.logprobs == [expected]


def test_objects_have_ollamas_fields() -> None:
    assert chat_object("m", "t", Piece(content="a", thinking="b")) == {
        "model": "m",
        "created_at": "t",
        "message": {"role": "assistant", "content": "a", "thinking": "b"},
        "done": False,
    }
    assert generate_object("m", "t", Piece(content="a")) == {
        "model": "m",
        "created_at": "t",
        "response": "a",
        "done": False,
    }


def test_statistics_are_nanoseconds_and_count_cached_tokens() -> None:
    assert statistics(Final("stop", TIMINGS), 10, 5) == {
        "done": True,
        "done_reason": "stop",
        "total_duration": 10,
        "load_duration": 5,
        "prompt_eval_count": 7,
        "prompt_eval_duration": 1_500_000,
        "eval_count": 2,
        "eval_duration": 250_000,
    }
