"""Large bodies are read beside the loop, to the same effect, and with limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import zstandard

from proxy_addon import reading
from proxy_addon.ask import BadRequest, parse
from proxy_addon.endpoints import Endpoint, match
from proxy_addon.reading import Reading, is_short
from tests.hostile.forms import MIB

TEXT = b'{"model":"llama3.2","messages":[{"role":"user","content":"%s"}]}'


@pytest.fixture
async def readers() -> AsyncIterator[Reading]:
    made = Reading()
    yield made
    await made.close()


def endpoint(path: str) -> Endpoint:
    found = match(path)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("headers", "content", "short"),
    [
        ({}, b"[" * 8192, True),
        ({}, TEXT % (b"word, " * 1000), True),
        ({}, TEXT % (b"word " * 40_000), True),
        ({}, TEXT % (b"word " * 60_000), False),
        ({}, b"[]," * 10_000, False),
        ({"content-encoding": "zstd"}, b"(", False),
        ({"content-type": "multipart/form-data; boundary=x"}, bytes(10_000), False),
    ],
)
def test_what_is_read_on_the_loop(headers: dict[str, str], content: bytes, short: bool) -> None:
    assert is_short(headers, content) is short


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "long " * 80_000}], "priority": "high"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 5000}),
        ("/api/generate", {"prompt": "b", "context": [*range(50_000)], "options": {"num_ctx": 8192}}),
        ("/api/create", {"from": "n", "files": {f"f{i}": f"sha256:{i:064}" for i in range(4000)}}),
    ],
)
async def test_the_other_process_reads_the_same(readers: Reading, path: str, body: dict[str, Any]) -> None:
    content = orjson.dumps({"model": "m", **body})
    assert not is_short({}, content)
    here = parse(endpoint(path), path, {}, content, "c")
    there = await readers.read(endpoint(path), path, {}, content, "c")
    kept = {"priority": "high"} if path == "/api/chat" else here.body if path == "/api/create" else {}
    assert there.body == kept
    here.body = there.body = {}
    assert there == here  # the keyed hashes of the prompt among the rest


async def test_a_compressed_body_is_read_there(readers: Reading) -> None:
    path, headers = "/v1/chat/completions", {"content-encoding": "zstd"}
    ask = await readers.read(endpoint(path), path, headers, zstandard.compress(TEXT % b"hi"), "c")
    assert ask.model == "llama3.2"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"model":"m","messages":[' + b"[]," * 400_000 + b"]}", 400),
        (b"[" * 300_000, 400),
        (b'{"model":' + b'"a' * 200_000, 400),
    ],
)
async def test_what_is_refused_there_is_refused_here(readers: Reading, content: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        await readers.read(endpoint("/api/chat"), "/api/chat", {}, content, "c")
    assert refused.value.status == status


async def test_a_body_that_takes_too_long_is_given_up_and_the_next_one_is_read(
    readers: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = "/api/chat", TEXT % (b"word " * 80_000)
    await readers.read(endpoint(path), path, {}, good, "c")
    monkeypatch.setattr(reading, "LIMIT_S", 0.0)
    with pytest.raises(BadRequest, match="to read") as refused:
        await readers.read(endpoint(path), path, {}, good, "c")
    assert refused.value.status == 413
    monkeypatch.setattr(reading, "LIMIT_S", 60.0)
    assert (await readers.read(endpoint(path), path, {}, good, "c")).model == "llama3.2"


async def test_a_body_whose_client_leaves_keeps_nobody_waiting(readers: Reading) -> None:
    path, good = "/api/chat", TEXT % (b"word " * 80_000)
    left = asyncio.create_task(
        readers.read(endpoint(path), path, {}, b'{"messages":[' + b"[]," * (300_000), "c")
    )
    await asyncio.sleep(0)
    left.cancel()
    assert (await readers.read(endpoint(path), path, {}, good, "c")).model == "llama3.2"
    assert left.cancelled()


async def test_an_order_without_a_prompt_is_short() -> None:
    long = b'{"model":"m","license":"' + b"a" * MIB + b'"}'
    with pytest.raises(BadRequest, match="at most 1 MiB") as refused:
        parse(endpoint("/api/create"), "/api/create", {}, long, "c")
    assert refused.value.status == 413
