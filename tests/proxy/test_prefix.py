"""The chain of hashes of a prompt: what two prompts have in common, and that no text is in it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.prefix import CHUNK_BYTES, FIRST_LINKS, LAST_LINKS, Prefix, prefix_of
from proxy_addon.prompt import parts_of

texts = st.text(max_size=50)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}),
    min_size=1,
    max_size=8,
)


def chain(**body: Any) -> Prefix:
    return prefix_of(parts_of(body))


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def common(one: Prefix, other: Prefix) -> int:
    """How many links both have from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a[0] != b[0]), len(one))


@given(messages, messages)
def test_a_conversation_that_goes_on_keeps_its_links(
    before: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    head, whole = chain(messages=before), chain(messages=before + more)
    assert whole[: len(head)] == head
    assert len(whole) > len(head)


@given(messages, st.data())
def test_another_text_changes_its_link_and_all_after_it(
    said_before: list[dict[str, Any]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(said_before) - 1))
    other = data.draw(texts.filter(lambda text: text != said_before[at]["content"]))
    changed = [*said_before[:at], said_before[at] | {"content": other}, *said_before[at + 1 :]]
    one, two = chain(messages=said_before), chain(messages=changed)
    assert one[:at] == two[:at]
    assert not {digest for digest, _ in one[at:]} & {digest for digest, _ in two[at:]}


@given(texts, texts)
def test_no_text_passes_for_two(one: str, two: str) -> None:
    (_, _), (split, _) = chain(messages=[said("user", one), said("user", two)])
    for joined in (f"{one}user\0{two}", f"{one}\0user\0{two}", [one, two], [one, "user", two]):
        assert chain(messages=[{"role": "user", "content": joined}])[-1][0] != split


@given(messages)
def test_tokens_grow_to_those_of_the_whole(conversation: list[dict[str, Any]]) -> None:
    tokens = [tokens for _, tokens in chain(messages=conversation)]
    assert tokens == sorted(tokens)
    assert tokens[-1] == sum(len(message["content"]) for message in conversation) // 4


@pytest.mark.parametrize("kilobytes", [1, 10, 100, 1000])
def test_a_shared_document_is_recognised_whatever_follows(kilobytes: int) -> None:
    document = "0123456789abcdef" * 64 * kilobytes
    one, two = (
        chain(prompt=f"{document} What is it?"),
        chain(prompt=f"{document} Summarize it, and be brief!"),
    )
    shared = common(one, two)
    assert shared > 0
    assert one[shared - 1][1] >= 0.87 * len(document) / 4
    assert len(one) <= FIRST_LINKS + LAST_LINKS
    assert common(one, chain(prompt=f"-{document}")) == 0


def test_a_beginning_is_recognised_far_before_the_end() -> None:
    document = "0123456789abcdef" * 64 * 200
    half = chain(prompt=document[: len(document) // 2] + "and now for something else" * 5000)
    whole = chain(prompt=document)
    assert whole[common(half, whole) - 1][1] >= 0.43 * len(document) / 4


def test_a_long_chat_has_a_bounded_chain_that_still_grows_at_its_end() -> None:
    turns = [said(("user", "assistant")[i % 2], f"turn {i}") for i in range(500)]
    before, after = chain(messages=turns[:-2]), chain(messages=turns)
    assert len(before) == len(after) == FIRST_LINKS + LAST_LINKS
    assert before[-1] in after[:-1]
    assert after[-1][1] == sum(len(turn["content"]) for turn in turns) // 4
    assert before[:FIRST_LINKS] == after[:FIRST_LINKS]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"images": ["iVBOR" * 999]}, {"images": ["iVBOR" * 998 + "iVBOS"]}),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}, {}),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 2}}}]},
        ),
    ],
)
def test_images_and_calls_of_tools_belong_to_a_message(one: dict[str, Any], other: dict[str, Any]) -> None:
    long = "x" * 3 * CHUNK_BYTES
    assert (
        chain(messages=[said("user", long, **one)])[-1] != chain(messages=[said("user", long, **other)])[-1]
    )


def test_an_image_comes_before_the_text_beside_it() -> None:
    one, other = (
        chain(messages=[said("user", "x" * 3 * CHUNK_BYTES, images=[image])]) for image in ("a" * 9, "b" * 9)
    )
    assert common(one, other) == 0


def test_tools_and_system_prompt_come_first_in_every_protocol() -> None:
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"q": {"type": "string"}}}}]
    asked = [said("user", "one")]
    for body in (
        {"messages": asked, "tools": tools, "system": "be brief"},
        {"input": asked, "tools": tools, "instructions": "be brief"},
        {"prompt": "one", "tools": tools, "system": "be brief"},
    ):
        head = chain(**{name: value for name, value in body.items() if value not in (asked, "one")})
        assert len(head) == 2
        assert chain(**body)[:2] == head


@given(messages)
def test_no_text_is_in_it(conversation: list[dict[str, Any]]) -> None:
    secret = "the launch code is 0000"
    made = chain(messages=[*conversation, said("user", secret * 100)])
    for shown in (repr(made).encode(), pickle.dumps(made)):
        assert b"launch" not in shown
    assert all(len(digest) == 16 for digest, _ in made)


def test_another_process_makes_other_hashes() -> None:
    program = (
        "from proxy_addon.prefix import prefix_of; from proxy_addon.prompt import parts_of;"
        "print(prefix_of(parts_of({'prompt': 'hello'}))[0][0].hex())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(there.stdout.strip()) == 32
    assert there.stdout.strip() != chain(prompt="hello")[0][0].hex()
