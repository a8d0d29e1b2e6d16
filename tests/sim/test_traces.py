"""The traces: the same seed gives the same work, of the shape that it is said to have."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from statistics import fmean, median

import orjson
import pytest

from proxy_addon import ask as asks
from proxy_addon.endpoints import match
from tests.fakes.native_api import prompt_of
from tests.fakes.tokens import expected_text, length_of
from tests.sim.fleet import machines_of
from tests.sim.hardware import MODELS, UNLIKE
from tests.sim.traces import CODE, CONVERSATION, REQUESTS, TRACES


@pytest.mark.parametrize("name", TRACES)
def test_a_seed_is_a_trace(name: str) -> None:
    make = TRACES[name]
    assert make(3) == make(3)
    assert make(3).arrivals != make(4).arrivals
    assert machines_of(make(3)) == machines_of(make(3))


@pytest.mark.parametrize("name", TRACES)
def test_its_requests_can_be_asked_and_checked(name: str) -> None:
    trace, known = TRACES[name](1), {model.name for model in MODELS}
    assert len(trace.arrivals) == REQUESTS == len({arrival.id for arrival in trace.arrivals})
    assert [a.at_s for a in trace.arrivals] == sorted(a.at_s for a in trace.arrivals)
    seen: set[str] = set()
    for arrival in trace.arrivals:
        endpoint = match(arrival.path)
        assert endpoint is not None and arrival.model in known
        ask = asks.parse(endpoint, arrival.path, {}, orjson.dumps(arrival.body()), arrival.client)
        assert ask.model == arrival.model and ask.max_tokens == arrival.num_predict
        assert 0 < ask.prompt_tokens < (4096 if arrival.messages else 64 * 600)
        if arrival.messages:
            prompt = prompt_of(arrival.messages)
            assert length_of(prompt, arrival.num_predict)[0] == arrival.output_tokens
            assert expected_text(prompt).startswith(f" {arrival.id}-0")
        assert arrival.after is None or arrival.after in seen
        seen.add(arrival.id)


def test_a_turn_has_all_that_was_said_before() -> None:
    arrivals = {arrival.id: arrival for arrival in TRACES["chats"](1).arrivals}
    later = [arrival for arrival in arrivals.values() if arrival.after is not None]
    assert len(later) == REQUESTS * 5 // 6
    for arrival in later:
        before = arrivals[arrival.after or ""]
        answer = {"role": "assistant", "content": expected_text(prompt_of(before.messages))}
        assert arrival.messages[: len(before.messages) + 1] == (*before.messages, answer)
        assert arrival.client == before.client and arrival.model == before.model


def test_lengths_have_the_moments_of_the_public_trace() -> None:
    for lengths in (*CONVERSATION, *CODE):
        free = type(lengths)(lengths.median, lengths.mean, 1 << 30)
        drawn = [free.draw(Random(f"{n}")) for n in range(4000)]
        assert median(drawn) == pytest.approx(lengths.median, rel=0.1)
        assert fmean(drawn) == pytest.approx(lengths.mean, rel=0.1)


def test_arrivals_come_in_bursts() -> None:
    times = [a.at_s for a in TRACES["mixed"](1).arrivals]
    gaps = [b - a for a, b in pairwise(times)]
    deviation = fmean((gap - fmean(gaps)) ** 2 for gap in gaps) ** 0.5
    assert deviation / fmean(gaps) > 1.2


def test_machines_are_near_what_their_kind_promises_but_not_it() -> None:
    for kind, spec in zip(UNLIKE, machines_of(TRACES["mixed"](5)), strict=True):
        promised = 0.55 * kind.bandwidth_bytes_s
        assert 1 / 1.31 < spec["decode_bytes_s"] / promised < 1.31
        assert spec["decode_bytes_s"] != promised
    equal = machines_of(TRACES["equal10"](1))
    assert all(spec == equal[0] for spec in equal)


def test_a_time_scale_is_kept_from_nobody() -> None:
    trace = TRACES["mixed"](1)
    for real, scaled in zip(machines_of(trace), machines_of(trace, 0.1), strict=True):
        assert scaled["memory_bandwidth_bytes_s"] == pytest.approx(10 * real["memory_bandwidth_bytes_s"])
        assert scaled["decode_bytes_s"] == real["decode_bytes_s"]
