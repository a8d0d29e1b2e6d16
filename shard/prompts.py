"""From messages to what llama-server is asked: rendered, counted, and cut to the context."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from shard.llama_server import LlamaServer
from shard.replies import error_message
from shard.translate import (
    IMAGE_TOKENS,
    TOO_LONG,
    Refusal,
    cut_middle,
    multimodal_prompt,
    shrinking,
    tagged_images,
)

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation: the messages that are in it, its text and its tokens."""

    messages: Sequence[Message]
    text: str
    ids: list[int]
    has_bos: bool

    def cut(self, num_ctx: int, num_keep: int, *, shift: bool) -> list[int]:
        """Return the tokens, no more than the context takes. Raises Refusal where it may not shift."""
        if len(self.ids) >= num_ctx and not shift:
            raise Refusal(400, TOO_LONG)
        return cut_middle(self.ids, num_ctx, num_keep, has_bos=self.has_bos)


async def whole(server: LlamaServer, path: str, body: Mapping[str, Any]) -> Any:
    """Return llama-server's answer to a POST. Raises Refusal with its status and sentence for an error."""
    status, raw = await server.post(path, body)
    if status >= 400:
        raise Refusal(status, error_message(raw))
    return orjson.loads(raw)


async def tokens_of(server: LlamaServer, text: str, *, add_special: bool = True) -> list[int]:
    """Return the tokens of a text, with those that the model wants around it if ``add_special``."""
    answer = await whole(server, "/tokenize", {"content": text, "add_special": add_special})
    return list(answer["tokens"])


async def fitted(
    server: LlamaServer,
    messages: Sequence[Message],
    render: Render,
    num_ctx: int,
    *,
    truncate: bool = True,
    before: Sequence[int] = (),
) -> Prompt:
    """Return the prompt of a conversation, its oldest messages left out if it is too long for the context.

    The last message and the system messages stay, so that the prompt may still be too long. ``before`` are
    tokens of earlier exchanges, which the prompt goes on from.
    """
    added = await tokens_of(server, "")
    for kept in shrinking(messages):
        text = await render(kept)
        ids = [*before, *await tokens_of(server, text, add_special=not before)]
        # A template may write the token out that llama-server adds: it is wanted once.
        if added and ids[:2] == [added[0]] * 2:
            del ids[0]
        images = sum(len(message.get("images") or ()) for message in kept)
        if not truncate or len(ids) + IMAGE_TOKENS * images < num_ctx:
            break
    return Prompt(kept, text, ids, bool(added) and ids[:1] == added[:1])


async def multimodal(server: LlamaServer, messages: Sequence[Message], render: Render) -> dict[str, Any]:
    """Return a prompt with images in llama-server's form."""
    async with server.request("GET", "/props") as response:
        props = orjson.loads(b"".join([chunk async for chunk in server.chunks(response)]))
    tagged, images = tagged_images(messages)
    return multimodal_prompt(await render(tagged), images, props.get("media_marker") or "<__media__>")
