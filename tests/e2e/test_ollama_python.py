"""The official Python client, blocking and asyncio, through the real proxy."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.e2e.house import CHAT, EMBED, LONE, REMOTE, House, Sent, open_house
from tests.fakes.engine import embedding, normalised
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream, expected_text, expected_thinking

PROMPT = "[[id:hello]] [[n:40]] Say something."
MESSAGES = [{"role": "user", "content": PROMPT}]
PNG = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}


class Caller:
    """One method call on the blocking or the asyncio client; a stream comes as the list of its parts."""

    def __init__(self, url: str, kind: str) -> None:
        self.sent = Sent()
        self._asynchronous = kind == "asyncio"
        hooks = self.sent.hooks(asynchronous=self._asynchronous)
        self._client: Any = (ollama.AsyncClient if self._asynchronous else ollama.Client)(
            url, event_hooks=hooks
        )

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._client, method)
        if self._asynchronous:
            got = await call(*args, **kwargs)
            return [part async for part in got] if kwargs.get("stream") else got

        def block() -> Any:
            return list(call(*args, **kwargs)) if kwargs.get("stream") else call(*args, **kwargs)

        return await asyncio.to_thread(block)

    async def close(self) -> None:
        if self._asynchronous:
            await self._client.close()
        else:
            self._client.close()


@pytest.fixture(params=["blocking", "asyncio"])
async def call(house: House, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    caller = Caller(house.url, request.param)
    yield caller
    await caller.close()


async def test_chat(house: House, call: Caller) -> None:
    parts = await call("chat", CHAT, MESSAGES, stream=True)
    check_stream("".join(part.message.content for part in parts), PROMPT)
    assert [part.done for part in parts] == [False] * 40 + [True]
    assert (parts[-1].eval_count, parts[-1].done_reason, parts[-1].model) == (40, "stop", CHAT)
    house.only("/api/chat", sent=call.sent)
    [node] = [node for node in house.nodes if node.requests("/api/chat")]
    assert call.sent.answers[-1]["x-sollol-node"] == node.host_port

    whole = await call("chat", CHAT, MESSAGES)
    assert (whole.message.content, whole.eval_count) == (expected_text(PROMPT), 40)
    assert call.sent.bodies[-1] in [got.body for _, got in house.reached("/api/chat")]


async def test_generate_with_everything(house: House, call: Caller) -> None:
    asked: dict[str, Any] = {
        "system": "Be brief.",
        "suffix": "the end",
        "template": "{{ .Prompt }}",
        "context": [1, 2, 3],
        "keep_alive": "10m",
        "images": [PNG],
        "options": {"num_predict": 7, "temperature": 0.5, "num_ctx": 2048, "stop": ["\n"]},
    }
    parts = await call("generate", CHAT, PROMPT, stream=True, **asked)
    assert check_stream("".join(part.response for part in parts), PROMPT, 7) == 7
    assert (parts[-1].done_reason, parts[-1].context) == ("length", [1, 2, 3])
    got = house.only("/api/generate", sent=call.sent)
    assert base64.b64decode(got.json["images"][0]) == PNG
    whole = await call("generate", CHAT, PROMPT, **asked)
    assert whole.response == expected_text(PROMPT, 7)
    assert {got.json["options"]["num_ctx"] for _, got in house.reached("/api/generate")} == {2048}


async def test_embeddings(house: House, call: Caller) -> None:
    answer = await call("embed", EMBED, ["one", "two"])
    assert answer.embeddings == [pytest.approx(normalised(embedding(text, 64))) for text in ("one", "two")]
    house.only("/api/embed", sent=call.sent)
    short = await call("embed", EMBED, "one", dimensions=8, truncate=True)
    assert [len(vector) for vector in short.embeddings] == [8]
    old = await call("embeddings", EMBED, "one")
    assert list(old.embedding) == pytest.approx(embedding("one", 64))
    assert not house.nodes[2].requests("/api/embed")  # it does not have the model


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_there_and_back(house: House, call: Caller, stream: bool) -> None:
    question = {"role": "user", "content": "[[id:Rome]] What is the weather?"}
    answer = await call("chat", CHAT, [question], tools=[TOOL], stream=stream)
    message = (answer[0] if stream else answer).message
    [tool_call] = message.tool_calls
    assert (tool_call.function.name, tool_call.function.arguments) == ("get_weather", {"city": "Rome"})
    result = {"role": "tool", "tool_name": "get_weather", "content": "[[id:sunny]] 20 degrees"}
    said = await call("chat", CHAT, [question, message, result], tools=[TOOL])
    check_stream(said.message.content, result["content"])
    assert call.sent.bodies == [got.body for got in _in_order(house, "/api/chat")]


async def test_thinking_images_and_formats(house: House, call: Caller) -> None:
    parts = await call("chat", CHAT, MESSAGES, stream=True, think=True)
    assert "".join(part.message.thinking or "" for part in parts) == expected_thinking(PROMPT)
    check_stream("".join(part.message.content for part in parts), PROMPT)
    thought = await call("generate", CHAT, PROMPT, think=True)
    assert thought.thinking == expected_thinking(PROMPT)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    seen = {"role": "user", "content": PROMPT, "images": [PNG]}
    await call("chat", CHAT, [seen], format=schema, keep_alive=-1)
    await call("chat", CHAT, [seen], format="json")
    assert call.sent.bodies[0] == _in_order(house, "/api/chat")[0].body
    first, second = (got.json for got in _in_order(house, "/api/chat")[1:])
    assert (first["format"], first["keep_alive"], second["format"]) == (schema, -1, "json")
    assert base64.b64decode(second["messages"][0]["images"][0]) == PNG


async def test_what_there_is_and_what_is_loaded(house: House, call: Caller) -> None:
    listed = await call("list")
    assert {row.model for row in listed.models} == {f"{name}:latest" for name in (CHAT, EMBED, LONE)}
    shown = await call("show", LONE)
    assert shown.details.family == "llama" and "completion" in shown.capabilities
    loaded = await call("generate", LONE, keep_alive=-1)
    assert (loaded.done_reason, loaded.response) == ("load", "")
    await call("chat", CHAT, MESSAGES)
    assert {row.model for row in (await call("ps")).models} == {f"{LONE}:latest", f"{CHAT}:latest"}
    unloaded = await call("generate", CHAT, keep_alive=0)
    assert unloaded.done_reason == "unload"
    assert {row.model for row in (await call("ps")).models} == {f"{LONE}:latest"}


async def test_ps_knows_what_was_just_loaded_and_unloaded() -> None:
    """``ollama run x; ollama ps; ollama stop x; ollama ps``, as quick as a script is."""
    async with open_house(poll={"interval_s": 3600.0}) as house:
        client = ollama.AsyncClient(house.url)
        await client.generate(LONE)
        assert [row.model for row in (await client.ps()).models] == [f"{LONE}:latest"]
        await client.generate(LONE, keep_alive=0)
        assert (await client.ps()).models == []


async def test_a_model_comes_is_renamed_sent_and_goes(house: House, call: Caller) -> None:
    rows = await call("pull", REMOTE.name, stream=True)
    completed = [row.completed or 0 for row in rows if row.digest]
    assert completed == sorted(completed) and completed[-1] == REMOTE.size == rows[-4].total
    assert rows[-1].status == "success"
    assert (await call("pull", REMOTE.name)).status == "success"
    assert (await call("copy", REMOTE.name, "me/mine:v1")).status == "success"
    check_stream((await call("generate", "me/mine:v1", PROMPT)).response, PROMPT)
    for stream in (True, False):
        pushed = await call("push", "me/mine:v1", stream=stream)
        assert (pushed[-1] if stream else pushed).status == "success"
    assert (await call("delete", REMOTE.name)).status == "success"
    assert "me/mine:v1" in {row.model for row in (await call("list")).models}
    with pytest.raises(ollama.ResponseError) as told:
        await call("generate", REMOTE.name, PROMPT)
    assert (told.value.status_code, told.value.error) == (404, f"model '{REMOTE.name}' not found")


@pytest.mark.parametrize("stream", [True, False])
async def test_models_are_made(house: House, call: Caller, tmp_path: Path, stream: bool) -> None:
    made = await call("create", "pirate", from_=LONE, system="Arr.", parameters={"top_k": 5}, stream=stream)
    assert (made[-1] if stream else made).status == "success"
    assert (await call("show", "pirate")).modelfile
    assert [bool(node.store.find("pirate")) for node in house.nodes] == [False, False, True]

    weights = tmp_path / "weights.gguf"
    weights.write_bytes(os.urandom(3 << 20))
    digest = await call("create_blob", weights)
    assert digest == f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    await call("create", "mine", files={"weights.gguf": digest}, stream=stream)
    check_stream((await call("generate", "mine", PROMPT)).response, PROMPT)
    assert [digest in node.store.blobs for node in house.nodes].count(True) == 1


ERRORS: list[tuple[str, tuple[Any, ...], int, str]] = [
    ("chat", ("x", MESSAGES), 404, "model 'x' not found"),
    ("generate", ("x", PROMPT), 404, "model 'x' not found"),
    ("show", ("x",), 404, "model 'x' not found"),
    ("delete", ("x",), 404, "model 'x' not found"),
    ("copy", ("x", "y"), 404, "not found"),
    ("embed", ("x", "text"), 404, 'model "x" not found, try pulling it first'),
    ("embeddings", ("x", "text"), 404, 'model "x" not found, try pulling it first'),
    ("push", ("x",), 404, "model 'x' not found"),
    ("chat", (EMBED, MESSAGES), 400, f'"{EMBED}" does not support chat'),
    ("pull", ("x",), 500, "pull model manifest: file does not exist"),
    ("create", ("z",), 400, "neither 'from' or 'files' was specified"),
]


async def test_errors_are_as_from_ollama(call: Caller) -> None:
    for method, args, status, sentence in ERRORS:
        for how in [{}, {"stream": True}] if method in ("chat", "generate") else [{}]:
            with pytest.raises(ollama.ResponseError) as told:
                await call(method, *args, **how)
            assert (told.value.status_code, sentence in told.value.error) == (status, True), (method, told)


async def test_a_duration_without_a_unit_is_refused_in_the_nodes_words(house: House, call: Caller) -> None:
    with pytest.raises(ollama.ResponseError, match='missing unit in duration "-1"') as told:
        await call("chat", CHAT, MESSAGES, keep_alive="-1")
    assert told.value.status_code == 400
    house.only("/api/chat")  # another node would say the same, and was not asked


async def test_a_node_that_dies_before_its_answer_is_not_noticed(house: House, call: Caller) -> None:
    for node in house.nodes[:2]:
        node.fail(Fault("rst", "before_head", path="/api/chat"))
    parts = await call("chat", CHAT, MESSAGES, stream=True)
    check_stream("".join(part.message.content for part in parts), PROMPT)


async def test_a_node_that_dies_in_its_answer_raises(house: House, call: Caller) -> None:
    for node in house.nodes:
        node.fail(Fault("rst", "after_chunks", chunks=5, path="/api/chat"))
    with pytest.raises(ollama.ResponseError, match="failed in mid-answer"):
        await call("chat", CHAT, MESSAGES, stream=True)


async def test_leaving_a_stream_stops_the_node(house: House) -> None:
    endless = [{"role": "user", "content": "[[id:long]] [[n:20000]]"}]

    def leave() -> None:
        client = ollama.Client(house.url)
        with closing(client.chat(CHAT, endless, stream=True)) as stream:  # type: ignore[type-var]
            assert next(stream).message.content == " long-0"  # type: ignore[call-overload]

    await asyncio.to_thread(leave)
    node, got = await house.wait_one("/api/chat")
    assert (await node.wait_finished(got)).outcome == "cancelled"


async def test_leaving_before_the_answer_stops_the_node(house: House) -> None:
    client = ollama.AsyncClient(house.url)
    asking = asyncio.create_task(client.generate(CHAT, "[[id:long]] [[n:20000]]"))
    node, got = await house.wait_one("/api/generate")
    asking.cancel()
    assert (await node.wait_finished(got)).outcome == "cancelled"


async def test_thirty_streams_at_once_do_not_mix(house: House) -> None:
    client = ollama.AsyncClient(house.url)

    async def one(number: int) -> None:
        prompt = f"[[id:client{number}]] [[n:60]] hello"
        parts = await client.chat(CHAT, [{"role": "user", "content": prompt}], stream=True)
        check_stream("".join([part.message.content async for part in parts]), prompt)

    await asyncio.gather(*map(one, range(30)))
    assert all(node.requests("/api/chat") for node in house.nodes)
    assert len(house.reached("/api/chat")) == 30


def _in_order(house: House, path: str) -> list[Any]:
    return sorted((got for _, got in house.reached(path)), key=lambda got: got.received_s)
