"""Separates a model's thinking from its answer, piece by piece as the text comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any


class _State(Enum):
    BEFORE = auto()  # nothing but white space has come
    BEGUN = auto()  # the opening tag has come, its white space is dropped
    THINKING = auto()
    ENDED = auto()  # the closing tag has come, its white space is dropped
    ANSWERING = auto()


class ThinkingParser:
    """Takes an answer's text and gives thinking and the rest apart.

    An answer that does not begin with the opening tag has no thinking. White space around the tags belongs to
    neither part. (Ollama's ``thinking/parser.go``.)
    """

    def __init__(self, opening: str, closing: str) -> None:
        self._opening = opening
        self._closing = closing
        self._state = _State.BEFORE
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Return what ``text`` adds to the thinking and to the answer; what may be a tag is held back."""
        self._held += text
        thinking = answer = ""
        while self._held:
            before = self._state
            more_thinking, more_answer = self._step()
            thinking += more_thinking
            answer += more_answer
            if self._state is before:
                break
        return thinking, answer

    def rest(self) -> tuple[str, str]:
        """Return what was held back, once nothing more comes."""
        held, self._held = self._held, ""
        thinks = self._state in (_State.BEGUN, _State.THINKING)
        return (held, "") if thinks else ("", held)

    def _step(self) -> tuple[str, str]:
        match self._state:
            case _State.BEFORE:
                return self._look_for_opening()
            case _State.BEGUN | _State.ENDED:
                self._held = self._held.lstrip()
                if self._held:
                    self._state = _State.THINKING if self._state is _State.BEGUN else _State.ANSWERING
                return "", ""
            case _State.THINKING:
                return self._think(), ""
            case _State.ANSWERING:
                return "", self._take(len(self._held))

    def _look_for_opening(self) -> tuple[str, str]:
        text = self._held.lstrip()
        if text.startswith(self._opening):
            self._held = text.removeprefix(self._opening)
            self._state = _State.BEGUN
        elif not self._opening.startswith(text):
            self._state = _State.ANSWERING
        return "", ""

    def _think(self) -> str:
        at = self._held.find(self._closing)
        if at >= 0:
            thought = self._take(at)
            self._take(len(self._closing))
            self._state = _State.ENDED
            return thought
        return self._take(len(self._held) - overlap(self._held, self._closing))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``tag``."""
    longest = min(len(text), len(tag))
    return next((length for length in range(longest, 0, -1) if text.endswith(tag[:length])), 0)


def without_thinking(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation without what the assistant thought aloud before the last question."""
    last_question = max((at for at, one in enumerate(messages) if one.get("role") == "user"), default=-1)
    kept = []
    for at, message in enumerate(messages):
        kept.append(dict(message))
        if message.get("role") == "assistant" and at < last_question:
            parser = ThinkingParser("<think>", "</think>")
            answer = parser.add(message.get("content") or "")[1]
            kept[-1]["content"] = answer + parser.rest()[1]
    return kept
