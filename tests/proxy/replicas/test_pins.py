"""What a pin needs, on made-up numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from proxy_addon.replicas.actions import Keep, Load, Unload
from proxy_addon.replicas.pins import KEEP_EVERY_S, LONGEST_PAUSE_S, Held, Past, Pin, Stand, hold

PIN = Pin("registry.ollama.ai/library/llama3.2:latest")
FOREVER = 250 * 365 * 86400.0


def loads(count: int, stand: Stand, past: Past, now_s: float = 0.0) -> list[float]:
    """When the next ``count`` loads are due, each a look at the moment that the look before named."""
    found: list[float] = []
    while len(found) < count:
        held = hold(PIN, stand, past, now_s)
        if held.action is not None:
            found.append(now_s)
        past, now_s = held.past, held.next_s
    return found


def test_what_is_missing_is_loaded_for_good() -> None:
    held = hold(PIN, Stand("a"), Past(), 5)
    assert held.action == Load(PIN.model, "a", "it is pinned and not in memory", pinned=True)
    assert held.trouble == ""


def test_what_is_there_for_ever_needs_nothing() -> None:
    assert hold(PIN, Stand("a", stays_s=FOREVER), Past("a"), 5) == Held(None, Past("a"))


@pytest.mark.parametrize("stays_s", [300.0, 4.0, -30.0])
def test_what_would_expire_is_kept(stays_s: float) -> None:
    held = hold(PIN, Stand("a", stays_s=stays_s), Past("a"), 5)
    assert isinstance(held.action, Keep)
    assert held.action.reason == f"it is pinned, and would have been gone in {max(stays_s, 0):.0f} s"


def test_a_client_that_names_a_keep_alive_each_time_makes_few_requests_of_ours() -> None:
    past, kept = Past("a"), 0
    for tenth in range(1000):  # for 100 s, always as a request has just left it
        held = hold(PIN, Stand("a", stays_s=300), past, tenth / 10)
        past, kept = held.past, kept + (held.action is not None)
    assert kept == 100 / KEEP_EVERY_S


def test_what_expires_soon_is_kept_again_sooner() -> None:
    past = hold(PIN, Stand("a", stays_s=4), Past("a"), 0).past
    assert hold(PIN, Stand("a", stays_s=4), past, 1.9).action is None
    assert hold(PIN, Stand("a", stays_s=4), past, 1.9).next_s == 2
    assert isinstance(hold(PIN, Stand("a", stays_s=2), past, 2).action, Keep)


def test_what_does_not_stay_is_loaded_ever_more_seldom_and_said_to_be_unsteady() -> None:
    times = loads(12, Stand("a"), Past())
    pauses = [b - a for a, b in pairwise(times)]
    assert pauses[:4] == [1, 2, 4, 8] and pauses[-1] == LONGEST_PAUSE_S
    past = Past("a", loads=4, load_again_s=20)
    for stand in (Stand("a"), Stand("a", stays_s=FOREVER)):
        trouble = hold(PIN, stand, past, 10).trouble
        assert trouble == "llama3.2:latest is pinned but does not stay in the memory of a"


def test_what_has_stayed_is_loaded_at_once_the_next_time() -> None:
    past = hold(PIN, Stand("a"), Past(), 0).past
    held = hold(PIN, Stand("a", stays_s=FOREVER), past, 0.5)
    assert (held.past.loads, held.next_s) == (1, 1)  # not for long yet
    past = hold(PIN, Stand("a", stays_s=FOREVER), past, 1).past
    assert past.loads == 0
    assert isinstance(hold(PIN, Stand("a"), past, 1.1).action, Load)


def test_nothing_is_sent_while_a_load_is_under_way() -> None:
    for stays_s in (None, 300.0):
        assert hold(PIN, Stand("a", loading=True, stays_s=stays_s), Past("a"), 0).action is None


def test_a_pin_that_cannot_be_met_says_why_and_waits_for_news() -> None:
    held = hold(PIN, Stand(None, "no node has it"), Past(), 0)
    assert held == Held(None, Past(), math.inf, "llama3.2:latest cannot be pinned: no node has it")


def test_a_load_that_failed_is_told_until_it_succeeds() -> None:
    past = Past("a", loads=1, load_again_s=10, error="500: no memory")
    trouble = "llama3.2:latest is pinned but cannot be loaded on a: 500: no memory"
    assert hold(PIN, Stand("a"), past, 9) == Held(None, past, 10, trouble)
    assert hold(PIN, Stand("a", stays_s=FOREVER), past, 10).trouble == ""


def test_where_a_pin_has_moved_its_old_place_is_given_up() -> None:
    moved = hold(PIN, Stand("b"), Past("a", loads=3, load_again_s=99), 0)  # a is lost
    assert isinstance(moved.action, Load) and moved.action.node == "b"
    back = hold(PIN, Stand("b", stays_s=FOREVER, also=frozenset({"a", "c"})), moved.past, 50)
    assert back.action == Unload(PIN.model, "a", "its pin has moved to b")
    after = hold(PIN, Stand("b", stays_s=FOREVER, also=frozenset({"a", "c"})), back.past, 51)
    assert after.action is None  # c is another's, and a has been told
