"""The soak's own judgement, on made-up outcomes; and a short soak of real processes."""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise
from math import inf
from typing import Any, get_args

import orjson
import pytest

from tests.fakes.tokens import StreamError, expected_text
from tests.soak.house import HOUSES, SETTINGS, SHARES
from tests.soak.judge import judge
from tests.soak.ledger import GRACE_S, Ledger
from tests.soak.measure import Measure, grown
from tests.soak.outcome import LIMIT_S, Outcome, Retry
from tests.soak.processes import ROOT
from tests.soak.schedule import Event, Kind, schedule
from tests.soak.shapes import SHAPES, Reading

A, B = "127.0.0.1:1", "127.0.0.1:2"
NOW = 1000.0
CI_MINUTES, CI_SEED = 0.7, "42"
CI = ("--minutes", str(CI_MINUTES), "--clients", "16", "--seed", CI_SEED)
#: The short soak: a minute of warm-up, rests and calm beside its own, and what slow machines add.
CI_LIMIT_S = 420.0


def made(end: str, **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "id": "1", "shape": "chat stream", "model": "wide", "manner": "stay", "fresh": False,
        "sent_s": NOW, "ended_s": NOW + 1, "end": end, "status": 200, "node": A,
    }  # fmt: skip
    return Outcome(**{**fields, **changes})


def both() -> Ledger:
    """Two nodes that have had ``wide`` since ever; ``A`` is dead from half a second on."""
    ledger = Ledger()
    ledger.gains(A, "wide", -inf)
    ledger.gains(B, "wide", -inf)
    ledger.trouble(A, "killed", NOW + 0.5)
    return ledger


def verdicts(outcome: Outcome, ledger: Ledger) -> list[str]:
    return [violation.what for violation in judge([outcome], ledger)]


@pytest.mark.parametrize("end", ["hang", "wrong", "silent", "broken"])
def test_what_is_never_excused(end: str) -> None:
    assert verdicts(made(end), both())


@pytest.mark.parametrize("end", ["ok", "left"])
def test_what_is_always_well(end: str) -> None:
    assert verdicts(made(end), both()) == []


def test_a_request_that_ended_late_is_a_violation_however_it_ended() -> None:
    assert verdicts(made("ok", ended_s=NOW + LIMIT_S + 10), Ledger()) == ["it ended after its limit"]
    assert verdicts(made("ok", ended_s=NOW + LIMIT_S + 10, slept_s=10.0), Ledger()) == []


def test_a_cut_needs_a_node_that_was_hurt() -> None:
    assert verdicts(made("cut"), both()) == []
    assert verdicts(made("cut", node=B), both()) == ["an answer was cut though its node was well"]


def test_a_cut_by_a_drain_needs_the_drain_to_have_lasted() -> None:
    ledger = Ledger()
    ledger.trouble("proxy", "restart", NOW - 1)
    assert verdicts(made("cut"), ledger)
    assert verdicts(made("cut", ended_s=NOW + SETTINGS["timeouts"]["drain_s"]), ledger) == []


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_failure_needs_that_nobody_well_held_the_model(status: int) -> None:
    found = verdicts(made("failed", status=status), both())
    assert found == [f"it failed while {B} was well and held the model"]
    ledger = both()
    ledger.trouble(B, "stopped", NOW - 3).to_s = NOW - GRACE_S + 1  # over, but not long enough
    assert verdicts(made("failed", status=status), ledger) == []
    ledger.troubles[-1].from_s, ledger.troubles[-1].to_s = NOW - 30, NOW - GRACE_S - 1
    assert verdicts(made("failed", status=status), ledger)


def test_a_client_error_is_never_right() -> None:
    assert verdicts(made("failed", status=400), Ledger()) == ["HTTP 400 for a request that is right"]


def test_a_model_counts_from_a_while_after_its_pull_until_its_delete() -> None:
    ledger = Ledger()
    ledger.gains(B, "fleeting", NOW)
    late = {"sent_s": NOW + GRACE_S + 1, "ended_s": NOW + GRACE_S + 3}
    assert ledger.healthy_holder("fleeting", NOW + 1, NOW + 2) is None
    assert verdicts(made("failed", status=404, model="fleeting", **late), ledger)
    ledger.loses("fleeting", NOW + GRACE_S + 2, B)
    assert verdicts(made("failed", status=404, model="fleeting", **late), ledger) == []


def test_a_delete_everywhere_is_one_on_every_node() -> None:
    ledger = both()
    ledger.loses("wide", NOW)
    assert ledger.healthy_holder("wide", NOW - 2, NOW - 1) == A
    assert ledger.healthy_holder("wide", NOW - 2, NOW + 0.1) is None


@pytest.mark.parametrize("why", ["refused", "stale"])
def test_a_connection_may_only_fail_while_the_proxy_is_restarted(why: Any) -> None:
    retried = made("ok", retries=[Retry(why, NOW)])
    ledger = Ledger()
    assert verdicts(retried, ledger) == [f"a connection was {why} while no proxy was restarted"]
    ledger.trouble("proxy", "restart", NOW - 1)
    assert verdicts(retried, ledger) == []
    ledger.troubles[0].what = "upgrade"
    assert verdicts(retried, ledger) == [f"a connection was {why} in an upgrade"]


def test_only_a_restart_may_turn_a_request_away() -> None:
    ledger = both()
    away = made("failed", status=503, detail="SOLLOL is shutting down")
    assert verdicts(away, ledger)
    renewal = ledger.trouble("proxy", "restart", NOW)
    assert verdicts(away, ledger) == []
    renewal.what = "upgrade"
    assert verdicts(away, ledger)


def test_outcomes_survive_the_file() -> None:
    outcome = made("ok", retries=[Retry("refused", 1.5)])
    assert Outcome.read(outcome.line()) == outcome


# the schedule


def test_the_schedule_is_a_function_of_the_seed() -> None:
    assert schedule("a", 600.0, renewals=True) == schedule("a", 600.0, renewals=True)
    assert schedule("a", 600.0, renewals=True) != schedule("b", 600.0, renewals=True)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_fault_comes_and_ends_in_time(seed: int) -> None:
    events = schedule(str(seed), 900.0, renewals=True)
    kinds = {event.kind for event in events}
    assert kinds == set(get_args(Kind))
    assert all(event.at_s >= 0 and event.at_s + event.for_s <= 900.0 for event in events)
    assert events == sorted(events)
    assert [e for e in events if e.kind == "reload"][-1].variant != "without"


@pytest.mark.parametrize("seed", range(20))
def test_a_node_is_hurt_by_one_thing_at_a_time(seed: int) -> None:
    events = schedule(str(seed), 900.0, renewals=False)
    for node in range(len(HOUSES)):
        hurts: list[Event] = [e for e in events if e.node == node and e.kind in ("kill", "stop")]
        assert all(one.at_s + one.for_s < two.at_s for one, two in pairwise(hurts))
    assert not {"restart", "upgrade"} & {event.kind for event in events}


def test_clients_ask_for_what_the_house_has() -> None:
    assert {model for house in HOUSES for model in house.models} < set(SHARES)


# reading answers

STREAMS = [shape for shape in SHAPES if shape.piece is not None]
PROMPT = "[[id:x]] [[n:2]]"
WORDS = [" x-0", " x-1"]


def _objects(path: str) -> list[bytes]:
    """A whole stream of two tokens, as the path's servers send it."""
    pieces: dict[str, Any] = {
        "/api/chat": lambda t: {"message": {"content": t}, "done": False},
        "/api/generate": lambda t: {"response": t, "done": False},
        "/v1/chat/completions": lambda t: {"choices": [{"delta": {"content": t}}]},
        "/v1/completions": lambda t: {"choices": [{"text": t}]},
        "/v1/responses": lambda t: {"type": "response.output_text.delta", "delta": t},
        "/v1/messages": lambda t: {"type": "content_block_delta", "delta": {"text": t}},
    }
    ends: dict[str, Any] = {
        "/api/chat": {"message": {"content": ""}, "done": True},
        "/api/generate": {"response": "", "done": True},
        "/v1/responses": {"type": "response.completed"},
        "/v1/messages": {"type": "message_stop"},
    }
    objects = [orjson.dumps(pieces[path](word)) for word in WORDS]
    objects.append(orjson.dumps(ends[path]) if path in ends else b"[DONE]")
    return [o + b"\n" if path.startswith("/api") else b"data: " + o + b"\n\n" for o in objects]


@pytest.mark.parametrize("shape", STREAMS, ids=lambda shape: shape.name)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_stream_is_read_however_it_is_cut_into_pieces(shape: Any, step: int) -> None:
    whole, reading = b"".join(_objects(shape.path)), Reading(shape)
    for start in range(0, len(whole), step):
        reading.feed(whole[start : start + step])
    reading.end()
    assert (reading.text, reading.done, reading.error) == (expected_text(PROMPT), True, None)


ERRORS = {
    "native": b'{"error":"gone"}\n',
    "openai": b'data: {"error":{"message":"gone"}}\n\n',
    "anthropic": b'event: error\ndata: {"type":"error","error":{"message":"gone"}}\n\n',
}


@pytest.mark.parametrize("shape", STREAMS, ids=lambda shape: shape.name)
def test_an_error_counts_in_the_clients_own_protocol_alone(shape: Any) -> None:
    for protocol, error in ERRORS.items():
        reading = Reading(shape)
        reading.feed(_objects(shape.path)[0])
        if protocol == shape.protocol:
            reading.feed(error)
            assert (reading.error, reading.done, reading.text) == ("gone", False, WORDS[0])
        elif protocol == "native":
            reading.feed(error)
            with pytest.raises(StreamError, match="half an object"):
                reading.end()
        else:
            with pytest.raises(StreamError):
                reading.feed(error)


@pytest.mark.parametrize("shape", STREAMS, ids=lambda shape: shape.name)
def test_what_comes_after_the_end_and_half_an_object_are_wrong(shape: Any) -> None:
    objects, reading = _objects(shape.path), Reading(shape)
    reading.feed(b"".join(objects))
    with pytest.raises(StreamError, match="after the end"):
        reading.feed(objects[0])
    half = Reading(shape)
    half.feed(objects[0] + objects[1][:-3])
    with pytest.raises(StreamError, match="half an object"):
        half.end()


# leaks

BASE = Measure(100 << 20, 30, 1, 10, 20, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rss_bytes": 200 << 20}, "RSS"),
        ({"fds": 90}, "other file descriptors"),
        ({"fds": 70, "node_sockets": 50}, "connections to nodes"),
        ({"tasks": 90}, "tasks"),
        ({"client_sockets": 2}, "connections of clients"),
        ({"open_requests": 2}, "open requests"),
        ({"in_flight": 1}, "requests in flight"),
        ({"queue": 1}, "requests in line"),
    ],
)
def test_each_leak_is_seen(changes: dict[str, int], what: str) -> None:
    [found] = grown(BASE, Measure(**{**vars(BASE), **changes}), nodes=6, kept=0)
    assert found.startswith(what)
    assert grown(BASE, BASE, nodes=6, kept=0) == []


# the soak itself


def test_the_short_soak_has_every_kind_of_fault() -> None:
    half_s = CI_MINUTES * 60 / 2
    first = schedule(f"{CI_SEED}/1", half_s, renewals=True)
    second = schedule(f"{CI_SEED}/2", half_s, renewals=False)
    assert {event.kind for event in first + second} == set(get_args(Kind))
    assert {"kill", "stop"} <= {event.kind for event in second}


@pytest.mark.timeout(CI_LIMIT_S + 30)
async def test_a_short_soak_breaks_nothing() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.soak", *CI, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(CI_LIMIT_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 0, said.decode()
