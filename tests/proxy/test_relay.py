"""The relay's pure parts: what is held, what is let through, what ends a stream that broke off."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mitmproxy.test.tflow import tflow

from proxy_addon import record, relay
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.record import Record

DONE = b'{"model":"m","done":true,"done_reason":"stop","total_duration":9,"eval_count":3,"eval_duration":6}\n'


def tee(path: str = "/api/chat", framing: relay.Framing = "ndjson", stream: bool = True) -> relay.Tee:
    endpoint = match(path)
    assert endpoint
    rec = Record("id", endpoint.protocol, 0.0, "127.0.0.1", endpoint, Ask(endpoint, stream=stream))
    return relay.Tee(rec, framing, lambda: 1.0)


def through(filter_: relay.Tee, pieces: Iterable[bytes]) -> list[bytes]:
    return [filter_(piece) or b"" for piece in pieces if piece]


def test_whole_lines_go_out_as_they_came() -> None:
    filter_ = tee()
    assert through(filter_, [b'{"a":1}\n', b'{"b":1}\n{"c":1}\n', DONE]) == [
        b'{"a":1}\n',
        b'{"b":1}\n{"c":1}\n',
        DONE,
    ]
    assert filter_(b"") == b""


def test_an_incomplete_line_waits_for_its_end_and_dies_with_its_node() -> None:
    filter_ = tee()
    assert through(filter_, [b'{"a":1}\n{"b"', b":2", b'}\n{"c":']) == [b'{"a":1}\n', b"", b'{"b":2}\n']
    assert filter_.cut("gone").startswith(b'{"error":"gone')
    assert filter_.cut("gone").endswith(b"}\n")


@pytest.mark.parametrize("stream", [True, False])
def test_that_a_model_has_been_made_is_said_at_the_end(stream: bool) -> None:
    filter_ = tee("/api/create", "ndjson" if stream else "whole", stream)
    begun, made = (
        (b'{"status":"reading"}\n', b'{"status":"success"}\n') if stream else (b"", b'{"status":"success"}')
    )
    assert through(filter_, [begun + made[:12], made[12:]]) == [begun, b""]
    assert filter_(b"") == made


def test_a_line_too_long_to_hold_is_passed_on_and_its_loss_is_told_on_a_line_of_its_own() -> None:
    filter_ = tee()
    long = b'{"a":"' + b"x" * relay.HOLD_LINE_BYTES
    assert filter_(long) == long
    assert filter_.cut("gone").startswith(b'\n{"error"')
    assert filter_(b'"}\n') == b'"}\n'
    assert filter_.cut("gone").startswith(b'{"error"')


def test_nothing_is_begun_of_an_answer_that_is_being_taken_back() -> None:
    flow = tflow(resp=True)
    assert flow.response is not None
    flow.response.headers["content-type"] = "application/x-ndjson"
    endpoint = match("/api/chat")
    assert endpoint
    rec = record.open_for(flow, endpoint.protocol, 0.0)
    rec.endpoint = endpoint
    first = b'{"message":{}}\n'
    assert relay.judge(flow, first, ended=False) == ("release", "")
    rec.moving = True
    assert relay.judge(flow, first, ended=False) == ("wait", "")
    assert relay.judge(flow, first, ended=True) == ("release", ""), "whole before the connection broke"


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"") + b"\n"), max_size=8),
    cuts=st.lists(st.integers(0, 160), max_size=8),
)
def test_no_byte_is_lost_doubled_or_moved(lines: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(lines) + DONE
    places = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    filter_ = tee()
    out = through(filter_, [whole[a:b] for a, b in pairwise(places)])
    assert b"".join(out) + (filter_(b"") or b"") == whole
    assert all(not piece or piece.endswith(b"\n") for piece in out)


@pytest.mark.parametrize(
    ("path", "framing", "good", "bad"),
    [
        ("/api/chat", "ndjson", DONE, b'{"message":{"content":"x"},"done":false}\n'),
        ("/api/generate", "ndjson", DONE, b'{"response":"\\"done\\":true","done":false}\n'),
        ("/v1/chat/completions", "sse", b"data: {}\n\ndata: [DONE]\n\n", b"data: {}\n\n"),
        (
            "/v1/messages",
            "sse",
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            b"event: ping\n\n",
        ),
        ("/v1/responses", "sse", b"event: response.completed\ndata: {}\n\n", b"event: response.x\n\n"),
    ],
)
def test_a_clean_end_without_the_final_object_is_told(
    path: str, framing: relay.Framing, good: bytes, bad: bytes
) -> None:
    complete, cut = tee(path, framing), tee(path, framing)
    complete(good)
    cut(bad)
    assert complete(b"") == b""
    tail = cut(b"")
    assert isinstance(tail, bytes)
    assert b"error" in tail and b"before the final object" in tail
    assert orjson.loads(tail[tail.index(b"{") :].strip())
    assert cut._rec.outcome == "cut"


@pytest.mark.parametrize(
    ("framing", "held", "ended", "verdict"),
    [
        ("ndjson", b'{"a":1', False, "wait"),
        ("ndjson", b'{"a":1}\n', False, "release"),
        ("ndjson", b"", True, "empty"),
        ("ndjson", b'{"error":"llama-server process has terminated"}\n', False, "first_line"),
        ("ndjson", b'{"message":{"content":"\\"error\\""},"done":false}\n', False, "release"),
        ("ndjson", b"x" * (relay.HOLD_LINE_BYTES + 1), False, "release"),
        ("sse", b'data: {"error":{"message":"boom"}}\n\n', False, "first_line"),
        ("sse", b'data: {"a":1}\n', False, "wait"),
        ("whole", b'{"a":1', False, "wait"),
        ("whole", b'{"a":1}', True, "release"),
        ("whole", b'{"a":1} \r\n', True, "release"),
        ("whole", b'{"a":1', True, "empty"),
        ("whole", b"", True, "empty"),
        ("sse", b'data: {"model":"","choices":[]}\n\n', False, "empty"),
        ("sse", b'data: {"model":"m","choices":[]}\n\n', False, "release"),
        ("opaque", b"x", False, "release"),
    ],
)
def test_the_first_bytes_are_judged(framing: relay.Framing, held: bytes, ended: bool, verdict: str) -> None:
    assert relay.judge_start(framing, held, ended)[0] == verdict


def test_an_error_in_the_first_line_is_read_in_both_shapes() -> None:
    assert relay.judge_start("ndjson", b'{"error":"a"}\n', False)[1] == "a"
    assert relay.judge_start("sse", b'data: {"error":{"message":"b"}}\n\n', False)[1] == "b"


@pytest.mark.parametrize(
    ("tail", "output", "decode_s", "reason"),
    [
        (DONE, 3, 6e-9, "stop"),
        (b'data: {"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\ndata: [DONE]\n\n', 7, None, None),
        (b'data: {"usage":{"output_tokens":4},"delta":{"stop_reason":"end_turn"}}\n\n', 4, None, "end_turn"),
    ],
)
def test_statistics_are_read_from_the_last_bytes(
    tail: bytes, output: int, decode_s: float | None, reason: str | None
) -> None:
    stats = relay.read_stats(tail)
    assert stats is not None
    assert (stats.output_tokens, stats.decode_s, stats.done_reason) == (output, decode_s, reason)


def test_no_statistics_are_invented() -> None:
    assert relay.read_stats(b'{"embedding":[0.1]}') is None
