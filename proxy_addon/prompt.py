"""A request's prompt in the order in which templates lay it out, whichever the protocol.

Only those who read a body while it is parsed see these parts (``analysis.py``, ``prefix.py``); none is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

BYTES_PER_TOKEN = 4.0  #: English text in common BPE vocabularies; learning corrects it per model
TOKENS_PER_IMAGE = 768  #: between gemma3's 256 and llava's 2,880: an image is worth a long paragraph

#: Where bodies keep what the model reads. Templates put tools and system prompt before the conversation.
_FIELDS = (
    "template",
    "tools",
    "system",
    "instructions",
    "context",
    "messages",
    "input",
    "images",
    "prompt",
    "suffix",
)
_MEDIA = frozenset({"image", "image_url", "input_image", "input_audio"})  #: types of content that are no text
_OF_USER = frozenset({"user", "prompt", "input"})


@dataclass(slots=True)
class Part:
    """A message, or another field of the body that the model reads."""

    role: str  #: of a message; else the field's name
    texts: list[str] = field(default_factory=list)
    media: list[Any] = field(default_factory=list)  #: images and sound, as the body has them
    tokens: float = 0.0  #: estimate

    def add(self, value: Any) -> None:
        """Take in what ``value`` has of text and media, in its order, at any depth."""
        todo = [value]
        while todo:
            item = todo.pop()
            if isinstance(item, str):
                self.texts.append(item)
                self.tokens += len(item) / BYTES_PER_TOKEN
            elif isinstance(item, list):
                if {*map(type, item)} == {int}:  # token ids
                    self.texts.append(orjson.dumps(item).decode())
                    self.tokens += len(item)
                else:
                    todo.extend(reversed(item))
            elif isinstance(item, dict):
                if item.get("type") in _MEDIA:
                    self._see([item])
                    continue
                for name, inner in reversed(item.items()):
                    if name == "images" and isinstance(inner, list):
                        self._see(inner)
                    elif name not in ("role", "type"):
                        todo.append(inner)
                        if self.role == "tools":  # templates print their JSON schema
                            todo.append(name)
            elif item is not None and not isinstance(item, bool):
                self.texts.append(str(item))  # a number among a tool call's arguments

    def _see(self, media: list[Any]) -> None:
        self.media.extend(media)
        self.tokens += len(media) * TOKENS_PER_IMAGE


def parts_of(body: Mapping[str, Any]) -> list[Part]:
    """The parts of the prompt in ``body``, whose shape nobody has checked: what is unknown is text."""
    found: list[Part] = []
    for name in _FIELDS:
        value = body.get(name)
        if not value:
            continue
        if name == "tools" or not isinstance(value, list) or not isinstance(value[0], dict):
            found.append(Part(name))
            found[-1].add({name: value})
            continue
        for message in value:
            role = message.get("role") if isinstance(message, dict) else None
            found.append(Part(role if isinstance(role, str) else name))
            found[-1].add(message)
    return found


def question(parts: list[Part]) -> list[str]:
    """The texts of the newest part that a user wrote; none if there is no such part."""
    return next((part.texts for part in reversed(parts) if part.role in _OF_USER), [])
