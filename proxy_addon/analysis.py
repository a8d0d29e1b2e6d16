"""What a request is about, by the seed's analysis: kind of task, complexity, need of a GPU.

Words and lengths only, no model: a wrong guess costs a preference, never an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from proxy_addon.endpoints import Task

Kind = Literal["generation", "classification", "summarization", "extraction", "embedding"]
Complexity = Literal["simple", "medium", "complex"]

SIMPLE_TOKENS = 100  #: a prompt below is simple
MEDIUM_TOKENS = 500  #: one below is of medium complexity
#: Characters that are searched at either end of a question: what is to be done with a document is said
#: before or after it.
SEARCHED = 1000

#: Words that tell the kind of task, the earlier the stronger.
WORDS: dict[str, Kind] = {
    "classify": "classification",
    "classification": "classification",
    "categorize": "classification",
    "categorise": "classification",
    "categorization": "classification",
    "categorisation": "classification",
    "summarize": "summarization",
    "summarise": "summarization",
    "summary": "summarization",
    "tldr": "summarization",
    "tl;dr": "summarization",
    "extract": "extraction",
    "extraction": "extraction",
}
_WORDS = tuple((word, re.compile(rf"\b{re.escape(word)}\b"), kind) for word, kind in WORDS.items())


def kind_of(task: Task, question: Sequence[str]) -> Kind:
    """The kind of a request: by its endpoint, else by the words of ``question``, the user's newest texts."""
    if task is Task.EMBED:
        return "embedding"
    text = " ".join(question)
    if len(text) > 2 * SEARCHED:
        text = f"{text[:SEARCHED]} {text[-SEARCHED:]}"
    text = text.lower()
    for word, pattern, kind in _WORDS:
        if word in text and pattern.search(text):  # the first test is much cheaper and mostly says no
            return kind
    return "generation"


def complexity_of(prompt_tokens: int) -> Complexity:
    """The complexity of a request, by the length of its prompt."""
    if prompt_tokens < SIMPLE_TOKENS:
        return "simple"
    return "medium" if prompt_tokens < MEDIUM_TOKENS else "complex"


def needs_gpu(task: Task, complexity: Complexity, images: int) -> bool:
    """Whether a GPU is wanted: for images, and for generation that is not simple.

    The seed names no rule; in its two examples generation of medium and of high complexity needs one.
    """
    return images > 0 or (task is Task.GENERATE and complexity != "simple")
