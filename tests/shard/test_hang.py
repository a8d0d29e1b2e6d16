"""What counts as a hang, and what is only slow: pulses in, verdict out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.hang import DECODE_STALL_S, PREFILL_STALL_S, Pulse, hung, pulse


def pulses(
    seconds: int,
    *,
    prefilling: int = 0,
    decoding: int = 0,
    tokens: Callable[[int], int] = lambda _: 5,
    received: Callable[[int], int] = lambda _: 100,
    cpu: Callable[[int], float] = lambda _: 1.0,
) -> list[Pulse]:
    """One pulse a second."""
    return [Pulse(float(t), prefilling, decoding, tokens(t), received(t), cpu(t)) for t in range(seconds + 1)]


@pytest.mark.parametrize(
    ("seen", "ms_per_token", "hangs"),
    [
        ([], 50, False),
        (pulses(600), 50, False),  # nobody is being served
        (pulses(6, decoding=1), 50, False),
        (pulses(8, decoding=1), 50, True),
        # CPU time does not excuse a token that is due: a peer that is gone keeps a thread spinning.
        (pulses(8, decoding=1, cpu=float), 50, True),
        (pulses(60, decoding=1, tokens=lambda t: t // 5), 50, False),  # a token every 5 s
        # A model that is planned to take 4 s for a token is given eight of them.
        (pulses(20, decoding=1), 4000, False),
        (pulses(33, decoding=1), 4000, True),
        # A long prefill: silent, but somebody computes.
        (pulses(600, prefilling=1, cpu=float), 50, False),
        (pulses(600, prefilling=1, received=lambda t: t * 10), 50, False),
        (pulses(600, prefilling=1, tokens=lambda t: t // 30), 50, False),
        (pulses(55, prefilling=1), 50, False),
        (pulses(61, prefilling=1), 50, True),
        # The decoding of one waits for the prefill of another.
        (pulses(30, prefilling=1, decoding=1, cpu=float), 50, False),
        (pulses(61, prefilling=1, decoding=1), 50, True),
        # An idle process still uses a millisecond now and then.
        (pulses(61, prefilling=1, cpu=lambda t: t / 1000), 50, True),
    ],
)
def test_what_is_a_hang(seen: list[Pulse], ms_per_token: float, hangs: bool) -> None:
    assert (hung(seen, ms_per_token) is not None) == hangs


def test_the_clock_starts_when_the_last_token_came() -> None:
    alive = pulses(30, decoding=1, tokens=lambda t: t)
    still = [Pulse(30.0 + t, 0, 1, 30, 100, 1.0) for t in range(1, 7)]
    assert hung(alive + still, 50) is None
    assert hung([*alive, *still, Pulse(37.0, 0, 1, 30, 100, 1.0)], 50) == (
        "no token for 7 s, although one is due"
    )


def test_a_prefill_that_turns_into_decoding_starts_anew() -> None:
    seen = pulses(50, prefilling=1, cpu=float) + [Pulse(51.0 + t, 0, 1, 6, 100, 50.0) for t in range(6)]
    assert hung(seen, 50) is None
    assert hung([*seen, Pulse(58.0, 0, 1, 6, 100, 50.0)], 50) is not None


@given(st.integers(2, 200), st.integers(0, 3), st.integers(0, 3))
def test_whoever_moves_is_never_hung(seconds: int, prefilling: int, decoding: int) -> None:
    assert hung(pulses(seconds, prefilling=prefilling, decoding=decoding, tokens=lambda t: t), 1) is None


@given(st.integers(0, 200), st.floats(0, 500))
def test_no_hang_is_called_before_its_time(seconds: int, ms_per_token: float) -> None:
    decoding = hung(pulses(seconds, decoding=1), ms_per_token)
    prefilling = hung(pulses(seconds, prefilling=1), ms_per_token)
    assert decoding is None or seconds >= DECODE_STALL_S
    assert prefilling is None or seconds >= PREFILL_STALL_S


def test_a_pulse_is_read_from_the_slots_as_llama_server_gives_them() -> None:
    slots = [
        {"id": 0, "is_processing": False, "n_prompt_tokens_processed": 9, "next_token": [{"n_decoded": 4}]},
        {"id": 1, "is_processing": True, "n_prompt_tokens_processed": 6, "next_token": [{"n_decoded": 58}]},
        {"id": 2, "is_processing": True, "n_prompt_tokens_processed": 512},
    ]
    assert pulse(3.0, slots, 7, 1.5) == Pulse(3.0, 1, 1, 6 + 58 + 512, 7, 1.5)
