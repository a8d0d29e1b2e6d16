"""Ejection and return, as a table of stories and as laws for any story."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.fleet.health import BASE_EJECTION_S, FAILURES_TO_EJECT, MAX_EJECTION_S, Health

#: f failure, F fatal failure, s success, p the poll after a loss; a number lets that many seconds pass.
STORIES = [
    # story, ejected at the end, allowance
    ("ff", False, None),
    ("fff", True, 1),
    ("ffsff", False, None),
    ("F", True, 1),
    ("F 1.9", True, 1),
    ("F 2", False, 1),
    ("F 2 F 3.9", True, 1),
    ("F 2 F 4", False, 1),
    ("F 2 F 4 F 8 F 16 F 32 F 59.9", True, 1),
    ("F 2 F 4 F 8 F 16 F 32 F 60", False, 1),
    ("F 2 f", True, 1),  # on trial, one failure is enough
    ("F 2 s f", False, 2),  # no longer on trial
    ("F 2 s s s", False, 8),
    ("F 2 s s s s", False, None),
    ("F 2 s s s s F 2", False, 1),  # back for good: the next ejection is a first one again
    ("F 1 F 1", False, 1),  # what fails during an ejection does not prolong it
    ("p", False, 1),
    ("p s s s s", False, None),
    ("F p", True, 1),  # a poll does not end what requests have brought
]


def play(story: str) -> tuple[Health, float]:
    health, now_s = Health(), 0.0
    for step in story.split() if " " in story else [story]:
        if step[0].isdigit():
            now_s += float(step)
            continue
        for letter in step:
            match letter:
                case "f" | "F":
                    health.failed(now_s, "refused", fatal=letter == "F")
                case "s":
                    health.succeeded()
                case "p":
                    health.polled()
    return health, now_s


@pytest.mark.parametrize(("story", "ejected", "allowance"), STORIES)
def test_stories(story: str, ejected: bool, allowance: int | None) -> None:
    health, now_s = play(story)
    assert (health.ejected(now_s), health.allowance) == (ejected, allowance)


def test_a_failure_says_whether_the_node_is_out_and_why() -> None:
    health = Health()
    assert not health.failed(0, "broke off")
    assert health.failed(0, "refused the connection", fatal=True)
    assert health.reason == "refused the connection"
    health.succeeded()
    assert health.reason is None


@pytest.mark.parametrize(
    ("allowance", "in_flight", "admitted"), [(None, 99, True), (1, 0, True), (1, 1, False)]
)
def test_admits(allowance: int | None, in_flight: int, admitted: bool) -> None:
    assert Health(allowance=allowance).admits(in_flight) is admitted


steps = st.lists(
    st.one_of(st.sampled_from(["fail", "fatal", "success", "poll"]), st.floats(0, 100)), max_size=200
)


@given(steps)
def test_no_story_ejects_longer_than_the_cap_or_for_ever(story: list[str | float]) -> None:
    health, now_s = Health(), 0.0
    for step in story:
        match step:
            case float():
                now_s += step
            case "fail" | "fatal":
                before_s = health.ejected_until_s
                out = health.failed(now_s, "x", fatal=step == "fatal")
                assert out or step == "fail"
                if health.ejected_until_s != before_s:
                    assert BASE_EJECTION_S <= round(health.ejected_until_s - now_s, 6) <= MAX_EJECTION_S
            case "success":
                health.succeeded()
            case "poll":
                health.polled()
        assert health.admits(0)
    assert not health.ejected(now_s + MAX_EJECTION_S)
    for _ in range(4):
        health.succeeded()
    assert (health.allowance, health.failures) == (None, 0)


def test_a_node_that_never_works_again_stays_at_the_cap() -> None:
    health, now_s = Health(), 0.0
    for _ in range(2000):  # a day and a half of trials: 2 to the 2000th is beyond a float
        health.failed(now_s, "refused", fatal=True)
        now_s = health.ejected_until_s
    assert health.failed(now_s, "refused", fatal=True)
    assert health.ejected_until_s - now_s == MAX_EJECTION_S


@given(st.integers(1, FAILURES_TO_EJECT - 1))
def test_a_few_failures_between_successes_never_eject(failures: int) -> None:
    health = Health()
    for _ in range(50):
        for _ in range(failures):
            assert not health.failed(0, "x")
        health.succeeded()
