"""What a node's runners are taken to hold, against a runner whose slots hold real text."""

from __future__ import annotations

from datetime import UTC, datetime
from os.path import commonprefix

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.report import Resident
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.fleet.node import Node
from proxy_addon.fleet.prefix_cache import PrefixCache, Slot
from proxy_addon.prefix import Prefix, prefix_of
from proxy_addon.prompt import parts_of

SYSTEM = "s" * 400  # 100 tokens
ANSWER = "a" * 200


def turns(*texts: str, system: str = SYSTEM) -> Prefix:
    """A conversation: what the user said, with an answer of 50 tokens between."""
    messages = [{"role": "system", "content": system}]
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
    return prefix_of(parts_of({"messages": messages[:-1]}))


ONE, TWO, THREE = turns("1" * 400), turns("1" * 400, "2" * 400), turns("1" * 400, "2" * 400, "3" * 400)
OTHER = turns("x" * 400, system="y" * 400)
ALIKE = turns("z" * 400)  # the same system prompt


def served(cache: PrefixCache, prefix: Prefix, slots: int = 1, output_tokens: int = 50) -> None:
    slot = cache.note("m", prefix, slots)
    assert slot is not None
    slot.ended(prefix, output_tokens)


def test_nothing_is_known_of_a_node_that_was_sent_nothing() -> None:
    assert PrefixCache().cached_tokens("m", ONE) == 0


def test_a_conversation_finds_all_up_to_its_last_question_and_the_answer_to_it() -> None:
    cache = PrefixCache()
    served(cache, ONE)
    assert cache.cached_tokens("m", TWO) == 100 + 100 + 50
    assert cache.cached_tokens("m", ONE) == 200  # asked again: no answer before it
    assert cache.cached_tokens("m", ALIKE) == 100
    assert cache.cached_tokens("m", OTHER) == 0
    assert cache.cached_tokens("m", ()) == 0
    assert cache.cached_tokens("another", TWO) == 0
    served(cache, TWO)
    assert cache.cached_tokens("m", THREE) == 350 + 50


def test_an_answer_is_not_expected_before_it_has_ended() -> None:
    cache = PrefixCache()
    cache.note("m", ONE, 1)
    assert cache.cached_tokens("m", TWO) == 200


def test_a_long_answer_that_was_not_sent_back_counts_for_no_more_than_the_prompt() -> None:
    cache = PrefixCache()
    served(cache, ONE, output_tokens=100_000)  # it thought for long
    assert cache.cached_tokens("m", TWO) == TWO[-1][1]


def test_one_slot_holds_one_conversation() -> None:
    cache = PrefixCache()
    served(cache, ONE)
    served(cache, OTHER)
    assert cache.cached_tokens("m", TWO) == 0


def test_each_slot_holds_one_and_the_one_unused_for_longest_is_given_away() -> None:
    cache = PrefixCache()
    fresh = [turns(str(i) * 400, system=str(i) * 400) for i in range(3)]
    served(cache, fresh[0], 2)
    served(cache, fresh[1], 2)
    served(cache, fresh[0], 2)
    served(cache, fresh[2], 2)
    assert [cache.cached_tokens("m", prefix) for prefix in fresh] == [200, 0, 200]


def test_the_slot_that_shares_enough_is_used_again_and_a_little_is_not_enough() -> None:
    cache = PrefixCache()
    served(cache, ONE, 2)
    served(cache, TWO, 2)
    served(cache, OTHER, 2)
    assert cache.cached_tokens("m", THREE) == 400  # the conversation has one slot, not both
    cache = PrefixCache()
    short = turns("1" * 4000, system="s" * 40)
    served(cache, short, 2)
    served(cache, turns("2" * 4000, system="s" * 40), 2)
    assert cache.cached_tokens("m", short) == 1010


def test_a_slot_at_work_serves_nobody_else_while_another_is_free() -> None:
    cache = PrefixCache()
    working = cache.note("m", ONE, 2)
    assert working is not None
    assert cache.cached_tokens("m", ALIKE) == 0
    beside = cache.note("m", ALIKE, 2)
    assert beside is not None
    assert cache.cached_tokens("m", TWO) == 200  # all work: it waits for whichever is free first
    working.ended(ONE, 50)
    assert cache.cached_tokens("m", ALIKE) == 100  # of the free one's
    beside.ended(ALIKE, 50)
    assert cache.cached_tokens("m", ALIKE) == 200


def test_the_answer_to_another_prompt_is_not_that_to_the_one_that_waits() -> None:
    cache = PrefixCache()
    first, waiting = cache.note("m", OTHER, 1), cache.note("m", ONE, 1)
    assert first is waiting is not None
    first.ended(OTHER, 50)
    assert cache.cached_tokens("m", TWO) == 200
    waiting.ended(ONE, 50)
    assert cache.cached_tokens("m", TWO) == 250


def test_fewer_slots_than_before_hold_less() -> None:
    cache = PrefixCache()
    served(cache, ONE, 2)
    served(cache, OTHER, 2)
    served(cache, OTHER, 1)
    assert (cache.cached_tokens("m", ONE), cache.cached_tokens("m", OTHER)) == (0, 200)


class Texts:
    """A runner whose slots hold text: what llama-server does, one request at a time."""

    def __init__(self, slots: int) -> None:
        self.slots = [""] * slots  # the one unused for longest first

    def serve(self, prompt: str) -> int:
        """Return how many characters of ``prompt`` were there already."""
        held = {slot: len(commonprefix((slot, prompt))) for slot in self.slots}  # noqa: RUF071  characters
        best = max(held, key=held.__getitem__)
        cached = held[best]
        if cached <= 0.1 * len(prompt):
            best = self.slots[0]
        self.slots.remove(best)
        self.slots.append(prompt + ANSWER)
        return cached


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 4)), max_size=40))
def test_one_after_the_other_it_tells_what_a_real_runner_would_have(
    slots: int, requests: list[tuple[str, int]]
) -> None:
    cache, real = PrefixCache(), Texts(slots)
    for who, length in requests:
        prefix = turns(*[who * 400] * length, system=who * 400)
        prompt = who * 400 + ANSWER.join([who * 400] * length)
        expected = cache.cached_tokens("m", prefix)
        assert expected == real.serve(prompt) // 4
        served(cache, prefix, slots)


@given(st.integers(1, 3), st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=40))
def test_however_requests_overlap_it_holds_one_conversation_a_slot(
    slots: int, steps: list[tuple[bool, str]]
) -> None:
    cache = PrefixCache()
    began: list[tuple[Slot | None, Prefix]] = []
    for begins, who in steps:
        if begins or not began:
            prefix = turns(who * 400, system=who * 400)
            began.append((cache.note("m", prefix, slots), prefix))
        else:
            slot, prefix = began.pop(0)
            assert slot is not None
            slot.ended(prefix, 50)
    for slot, prefix in began:
        assert slot is not None
        slot.ended(prefix, 50)
    held = {who for who in "abcdef" if cache.cached_tokens("m", turns(who * 400, system=who * 400))}
    assert len(held) <= slots
    if began:
        assert began[-1][1][0][0] in {turns(who * 400, system=who * 400)[0][0] for who in held}


# what a node does with it


def ask(prefix: Prefix, num_ctx: int | None = None) -> Ask:
    endpoint = match("/api/chat")
    assert endpoint is not None
    reload_key = (("num_ctx", num_ctx),) if num_ctx else ()
    return Ask(endpoint, "m", "m", num_ctx=num_ctx, reload_key=reload_key, prefix=prefix)


def resident(context: int = 4096, minute: int = 0) -> dict[str, Resident]:
    at = datetime(2026, 1, 1, 0, minute, tzinfo=UTC)
    return {"m": Resident(name="m", size=1, context_length=context, expires_at=at)}


@pytest.fixture
def node() -> Node:
    """It has answered the first turn of a conversation."""
    node = Node("10.0.0.1", 11434, parallel=2)
    node.take(ask(ONE), 0.0, 1.0).drop(50)
    node.loaded_with["m"] = ()
    node.holds(resident())
    assert node.prefixes.cached_tokens("m", TWO) == 250
    return node


def test_a_runner_that_stays_keeps_what_it_has(node: Node) -> None:
    node.holds(resident(minute=5))  # used again meanwhile
    assert node.prefixes.cached_tokens("m", TWO) == 250
    assert node.loaded_with == {"m": ()}


@pytest.mark.parametrize("later", [{}, resident(context=8192)])
def test_a_runner_that_was_unloaded_or_reloaded_by_others_has_nothing(
    node: Node, later: dict[str, Resident]
) -> None:
    node.holds(later)
    assert node.prefixes.cached_tokens("m", TWO) == 0
    assert node.loaded_with == {}  # whoever loads it next does so with unknown options


@pytest.mark.parametrize("seen", [[{}, resident(context=8192)], [resident(context=8192)], [{}], []])
def test_a_reload_of_ours_loses_what_was_before_and_keeps_what_came_with_it(
    node: Node, seen: list[dict[str, Resident]]
) -> None:
    flight = node.take(ask(OTHER, 8192), 1.0, 1.0, load=True)
    node.loaded_with["m"] = flight.ask.reload_key
    for state in seen:
        node.holds(state)
    assert node.prefixes.cached_tokens("m", TWO) == 0
    shared = node.take(ask(OTHER, 8192), 1.5, 1.0, load=True)  # waits for the same load
    for each in (flight, shared):
        each.first_byte_s = 2.0
        each.drop(7)
    node.holds(resident(context=8192))
    assert node.prefixes.cached_tokens("m", OTHER) == 200
    assert node.loaded_with["m"] == flight.ask.reload_key
    node.holds({})
    assert node.prefixes.cached_tokens("m", OTHER) == 0


def test_a_load_that_failed_protects_nothing(node: Node) -> None:
    node.take(ask(OTHER, 8192), 1.0, 1.0, load=True).drop()
    node.holds(resident())
    node.holds({})
    assert node.prefixes.cached_tokens("m", OTHER) == 0
    assert node.loaded_with == {}
