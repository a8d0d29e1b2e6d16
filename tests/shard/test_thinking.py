from typing import Any

import pytest

from shard.thinking import ThinkingParser, overlap, without_thinking


def parts(text: str, size: int) -> tuple[str, str]:
    parser = ThinkingParser("<think>", "</think>")
    added = [parser.add(text[at : at + size]) for at in range(0, len(text), size)] + [parser.rest()]
    return "".join(one[0] for one in added), "".join(one[1] for one in added)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>a b</think>c d", "a b", "c d"),
        (" \n<think>\n a</think>\n\nb ", "a", "b "),
        ("<think>a < b </thin </think>c</think>", "a < b </thin ", "c</think>"),
        ("no <think>a</think>", "", "no <think>a</think>"),
        (" plain", "", " plain"),
        ("<thin", "", "<thin"),
        ("<think>a</thi", "a</thi", ""),
        ("<think></think>b", "", "b"),
        ("<think>a", "a", ""),
        ("", "", ""),
    ],
)
def test_thinking_and_answer_come_apart_at_any_cut(text: str, size: int, thinking: str, answer: str) -> None:
    assert parts(text, size) == (thinking, answer)


def test_nothing_is_held_back_that_cannot_be_a_tag() -> None:
    parser = ThinkingParser("<think>", "</think>")
    pieces = ("<think>", "a", "b <", "c", "</think>", "\n", "d", "<think>")
    assert [parser.add(piece) for piece in pieces] == [
        ("", ""), ("a", ""), ("b ", ""), ("<c", ""), ("", ""), ("", ""), ("", "d"), ("", "<think>"),
    ]  # fmt: skip


def test_overlap_is_the_longest_beginning_of_a_tag() -> None:
    assert [overlap(text, "</a>") for text in ("x", "x<", "x</a", "x</a>", "<<")] == [0, 1, 3, 4, 1]


def test_earlier_thinking_is_left_out_of_a_conversation() -> None:
    def said(role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": content}

    thought = said("assistant", "<think>a</think>\nb")
    messages = [said("user", "<think>q</think>"), thought, said("user", "q"), thought]
    assert [message["content"] for message in without_thinking(messages)] == [
        "<think>q</think>", "b", "q", "<think>a</think>\nb"
    ]  # fmt: skip
