"""What one client may ask: buckets and counts, alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.admission.limits import IDLE_CLIENTS, Bucket, Limits, Refused, queue_full
from proxy_addon.settings import ClientClass


def of(**limits: object) -> ClientClass:
    return ClientClass.model_validate({"name": "app", "key": "k"} | limits)


@given(st.lists(st.floats(0, 5), max_size=60), st.sampled_from([0.2, 1.0, 3.0]), st.integers(1, 10))
def test_a_bucket_lets_through_its_rate_and_one_burst(
    gaps_s: list[float], rate_per_s: float, burst: int
) -> None:
    """In any span of time, counted from any request that passed."""
    bucket, now_s = Bucket(rate_per_s, burst, burst, 0.0), 0.0
    passed_s: list[float] = []
    for gap_s in gaps_s:
        now_s += gap_s
        wait_s = bucket.take(now_s)
        if wait_s == 0:
            passed_s.append(now_s)
        else:
            assert 0 < wait_s <= 1 / rate_per_s
    for first, since_s in enumerate(passed_s):
        for last, until_s in enumerate(passed_s[first:], first):
            assert last - first + 1 <= burst + (until_s - since_s) * rate_per_s + 1e-6


def test_after_the_time_it_names_one_more_passes() -> None:
    bucket = Bucket(0.5, 1, 1, 0.0)
    assert bucket.take(0.0) == 0
    assert bucket.take(bucket.take(0.0)) == 0


def test_who_is_refused_for_being_many_pays_no_token() -> None:
    limits, of_app = Limits(), of(max_in_flight=1, rate_per_s=0.001, burst=2)
    limits.enter(of_app, "a", 0.0)
    for _ in range(5):
        with pytest.raises(Refused) as refused:
            limits.enter(of_app, "a", 0.0)
        assert (refused.value.status, refused.value.reason) == (429, "in_flight")
    limits.leave(of_app, "a")
    limits.enter(of_app, "a", 0.0)
    limits.leave(of_app, "a")
    with pytest.raises(Refused) as refused:
        limits.enter(of_app, "a", 0.0)
    assert refused.value.reason == "rate"


def test_each_address_of_a_class_has_limits_of_its_own() -> None:
    limits, of_app = Limits(), of(max_in_flight=1)
    limits.enter(of_app, "10.0.0.1", 0.0)
    limits.enter(of_app, "10.0.0.2", 0.0)
    with pytest.raises(Refused):
        limits.enter(of_app, "10.0.0.1", 0.0)


def test_clients_that_hold_nothing_are_forgotten() -> None:
    limits, of_app = Limits(), of(rate_per_s=10, burst=1)
    for number in range(10 * IDLE_CLIENTS):
        limits.enter(of_app, f"{number}", float(number))
        limits.leave(of_app, f"{number}")
    assert len(limits._clients) <= IDLE_CLIENTS


@pytest.mark.parametrize(("expected_s", "header"), [(0.0, "1"), (2.1, "3"), (1e9, "60")])
def test_when_to_come_back_is_a_whole_number_of_seconds_within_reason(expected_s: float, header: str) -> None:
    assert queue_full(5, expected_s).headers == {"retry-after": header}
