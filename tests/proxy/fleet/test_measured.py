"""A changed speed is believed at once, an outlier is not, and a fall is remembered until it is over."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.fleet.measured import Outcomes, Rate


def rate(*values: float) -> Rate:
    made = Rate()
    for value in values:
        made.add(value)
    return made


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0, 5.0])
def test_two_far_ones_in_a_row_are_a_change(factor: float) -> None:
    changing = rate(*[100.0, 110.0, 90.0] * 4)
    before = changing.value
    assert changing.add(100 * factor) == 0
    assert changing.value == before
    assert changing.add(100 * factor) != 0
    assert changing.value == pytest.approx(100 * factor, rel=0.01)
    assert changing.fallen == (factor < 1)


def test_one_outlier_moves_nothing_and_is_forgotten() -> None:
    steady = rate(*[100.0] * 8)
    for value in (20.0, 100.0, 20.0, 100.0):
        steady.add(value)
        assert steady.value == pytest.approx(100)
    assert not steady.fallen


def test_outliers_on_both_sides_are_noise_not_change() -> None:
    steady = rate(*[100.0] * 8)
    assert [steady.add(value) for value in (20.0, 500.0, 20.0, 500.0)] == [0] * 4


@given(st.integers(0, 1000))
def test_noise_is_no_change_once_it_is_known_for_noise(seed: int) -> None:
    draw = random.Random(seed)
    noisy = rate(*(draw.lognormvariate(3, 0.15) for _ in range(20)))
    changes = [noisy.add(draw.lognormvariate(3, 0.15)) for _ in range(50)]
    assert not any(changes)


def test_a_fall_is_over_when_the_old_level_is_reached() -> None:
    falling = rate(*[100.0] * 6, 20.0, 20.0)
    assert falling.fallen
    falling.add(25.0)
    assert falling.fallen
    falling.add(100.0)
    falling.add(100.0)
    assert not falling.fallen
    assert falling.value == pytest.approx(100)


def test_a_second_fall_does_not_lower_what_it_once_was() -> None:
    falling = rate(*[100.0] * 6, 40.0, 40.0, 10.0, 10.0)
    assert falling.past == pytest.approx(rate(100.0).log, abs=0.3)


def test_others_follow_down_and_back_but_not_beyond() -> None:
    other = rate(100.0, 100.0)
    other.shift(-1.0)
    assert other.fallen
    other.shift(2.0)
    assert other.value == pytest.approx(100)
    assert not other.fallen
    other.shift(1.0)
    assert other.value == pytest.approx(100)
    unmeasured = Rate()
    unmeasured.shift(-1.0)
    assert unmeasured.measured is None


@given(st.lists(st.tuples(st.floats(1, 1000), st.floats(1, 10)), min_size=1, max_size=20))
def test_what_is_known_between_bounds_ends_within_those_of_the_last(
    bounds: list[tuple[float, float]],
) -> None:
    """Always the same bounds: the value may not stay outside of them."""
    low, ratio = bounds[-1]
    between = Rate()
    for first_low, first_ratio in bounds:
        between.add_between(first_low, first_low * first_ratio)
    for _ in range(60):
        between.add_between(low, low * ratio)
    assert low * 0.99 <= between.value <= low * ratio * 1.01


def test_a_failing_node_is_believed_again_after_a_few_dozen_successes() -> None:
    outcomes = Outcomes()
    for _ in range(5):
        outcomes.add(True, 0.0)
    assert outcomes.failure(0.0) > 0.25
    for _ in range(40):
        outcomes.add(False, 60.0)
    assert outcomes.failure(60.0) < 0.05


def test_who_fails_now_and_then_is_not_taken_for_sound() -> None:
    outcomes = Outcomes()
    for number in range(200):
        outcomes.add(number % 10 == 0, float(number))
    assert outcomes.failure(200.0) > 0.04
