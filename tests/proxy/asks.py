"""The same question in every protocol that the proxy speaks, and the answer taken apart as a client would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson


@dataclass
class Heard:
    """What a client heard: the text so far, an explicit error if one came, and whether the end was proper."""

    status: int
    headers: dict[str, str]
    raw: bytes = b""
    text: str = ""
    error: str | None = None
    ended: bool = False  #: the protocol's own terminator came
    broken: bool = False  #: the connection broke before the body's end
    objects: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """One way to ask: path, body, and how to read the answer."""

    name: str
    path: str
    body: Callable[[str], dict[str, Any]]
    stream: bool
    read: Callable[[Heard], None]

    def __str__(self) -> str:
        return self.name


def _lines(heard: Heard) -> list[Any]:
    lines = heard.raw.split(b"\n")
    assert lines[-1] == b"" or heard.broken, f"half a line at the end: {lines[-1]!r}"
    assert all(lines[:-1]), "a blank line in NDJSON"
    return [orjson.loads(line) for line in lines if line]


def _events(heard: Heard) -> list[Any]:
    found: list[Any] = []
    for block in heard.raw.decode().split("\n\n"):
        data = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
        if data:
            found.append("[DONE]" if data[0] == "[DONE]" else orjson.loads(data[0]))
    return found


def _native(pick: Callable[[dict[str, Any]], str]) -> Callable[[Heard], None]:
    def read(heard: Heard) -> None:
        heard.objects = _lines(heard) if b"\n" in heard.raw else [orjson.loads(heard.raw)]
        for item in heard.objects:
            if "error" in item:
                heard.error = item["error"]
            else:
                assert not heard.ended, "an object after done:true"
                heard.text += pick(item)
                heard.ended = item.get("done", True)

    return read


def _openai_stream(pick: Callable[[dict[str, Any]], str]) -> Callable[[Heard], None]:
    def read(heard: Heard) -> None:
        if heard.status != 200:
            heard.error = orjson.loads(heard.raw)["error"]["message"]
            return
        heard.objects = _events(heard)
        for item in heard.objects:
            if item == "[DONE]":
                heard.ended = True
            elif "error" in item:
                heard.error = item["error"]["message"]
            else:
                heard.text += "".join(pick(choice) or "" for choice in item["choices"])

    return read


def _openai_whole(pick: Callable[[dict[str, Any]], str]) -> Callable[[Heard], None]:
    def read(heard: Heard) -> None:
        item = orjson.loads(heard.raw)
        if "error" in item:
            heard.error = item["error"]["message"]
        else:
            heard.text, heard.ended = pick(item["choices"][0]), True

    return read


def _anthropic_stream(heard: Heard) -> None:
    if heard.status != 200:
        heard.error = orjson.loads(heard.raw)["error"]["message"]
        return
    heard.objects = _events(heard)
    for item in heard.objects:
        if item["type"] == "content_block_delta":
            heard.text += item["delta"].get("text", "")
        elif item["type"] == "error":
            heard.error = item["error"]["message"]
        elif item["type"] == "message_stop":
            heard.ended = True


def _anthropic_whole(heard: Heard) -> None:
    item = orjson.loads(heard.raw)
    if item.get("type") == "error":
        heard.error = item["error"]["message"]
    else:
        heard.text, heard.ended = "".join(b.get("text", "") for b in item["content"]), True


def _embed(heard: Heard) -> None:
    item = orjson.loads(heard.raw)
    heard.error, heard.ended = item.get("error"), "embeddings" in item


MODEL = "llama3.2"


def _chat(prompt: str, stream: bool) -> dict[str, Any]:
    return {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": prompt}]}


WAYS: tuple[Way, ...] = (
    Way("chat", "/api/chat", lambda p: _chat(p, True), True, _native(lambda i: i["message"]["content"])),
    Way(
        "chat-whole",
        "/api/chat",
        lambda p: _chat(p, False),
        False,
        _native(lambda i: i["message"]["content"]),
    ),
    Way(
        "generate",
        "/api/generate",
        lambda p: {"model": MODEL, "prompt": p},
        True,
        _native(lambda i: i["response"]),
    ),
    Way(
        "openai",
        "/v1/chat/completions",
        lambda p: _chat(p, True),
        True,
        _openai_stream(lambda c: c["delta"].get("content", "")),
    ),
    Way(
        "openai-whole",
        "/v1/chat/completions",
        lambda p: _chat(p, False),
        False,
        _openai_whole(lambda c: c["message"]["content"]),
    ),
    Way(
        "anthropic",
        "/v1/messages",
        lambda p: {**_chat(p, True), "max_tokens": 1000},
        True,
        _anthropic_stream,
    ),
    Way(
        "anthropic-whole",
        "/v1/messages",
        lambda p: {**_chat(p, False), "max_tokens": 1000},
        False,
        _anthropic_whole,
    ),
    Way("embed", "/api/embed", lambda p: {"model": MODEL, "input": p}, False, _embed),
)
BY_NAME = {way.name: way for way in WAYS}


async def ask(session: aiohttp.ClientSession, url: str, way: Way, prompt: str, **extra: Any) -> Heard:
    """Ask ``prompt`` and hear the answer to its end, whatever that is."""
    async with session.post(url + way.path, json={**way.body(prompt), **extra}) as answer:
        heard = Heard(answer.status, {k.lower(): v for k, v in answer.headers.items()})
        try:
            async for piece in answer.content.iter_any():
                heard.raw += piece
        except aiohttp.ClientError:
            heard.broken = True
    if not (heard.broken and not way.stream):
        way.read(heard)
    return heard
