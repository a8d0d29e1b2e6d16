"""The official OpenAI client through the real proxy."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.e2e.house import CHAT, EMBED, LONE, House, Sent, open_house
from tests.fakes.engine import embedding, normalised
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream, expected_text, expected_thinking

PROMPT = "[[id:hello]] [[n:40]] Say something."
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG not quite").decode()
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}


def client_of(house: House, sent: Sent | None = None) -> openai.AsyncOpenAI:
    hooks = sent.hooks() if sent else {}
    http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
    return openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
async def client(house: House, sent: Sent) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(house, sent) as opened:
        yield opened


async def test_chat(house: House, client: openai.AsyncOpenAI, sent: Sent) -> None:
    stream = await client.chat.completions.create(
        model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    check_stream("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), PROMPT)
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 40 + ["stop"]
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 40
    got = house.only("/v1/chat/completions", sent=sent)
    assert got.header("authorization") == "Bearer none"

    whole = await client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=7)
    assert whole.choices[0].message.content == expected_text(PROMPT, 7)
    assert (whole.choices[0].finish_reason, whole.model) == ("length", CHAT)


async def test_the_blocking_client(house: House) -> None:
    def work() -> str:
        with openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    check_stream(await asyncio.to_thread(work), PROMPT)


async def test_images_reasoning_and_formats(house: House, client: openai.AsyncOpenAI, sent: Sent) -> None:
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    whole = await client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc]
        reasoning_effort="high",
        response_format={"type": "json_object"},
        extra_body={"keep_alive": "10m"},
    )
    assert whole.choices[0].message.content == expected_text(PROMPT)
    assert whole.choices[0].message.model_extra == {"reasoning": expected_thinking(PROMPT)}
    got = house.only("/v1/chat/completions", sent=sent)
    assert got.json["messages"][0]["content"][1]["image_url"]["url"] == PIXEL


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_there_and_back(client: openai.AsyncOpenAI, stream: bool) -> None:
    question: Any = {"role": "user", "content": "[[id:Rome]] What is the weather?"}
    answer: Any = await client.chat.completions.create(
        model=CHAT, messages=[question], tools=[TOOL], stream=stream
    )
    if stream:
        calls = [c async for chunk in answer for c in chunk.choices[0].delta.tool_calls or []]
    else:
        calls = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
    [call] = calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city":"Rome"}')
    asked = {"id": call.id, "type": "function", "function": call.function.model_dump()}
    result: Any = [
        question,
        {"role": "assistant", "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": call.id, "content": "[[id:sunny]] 20 degrees"},
    ]
    said = await client.chat.completions.create(model=CHAT, messages=result, tools=[TOOL])
    check_stream(said.choices[0].message.content or "", "[[id:sunny]]")


async def test_completions(house: House, client: openai.AsyncOpenAI, sent: Sent) -> None:
    stream = await client.completions.create(model=CHAT, prompt=PROMPT, stream=True)
    check_stream("".join([chunk.choices[0].text async for chunk in stream if chunk.choices]), PROMPT)
    house.only("/v1/completions", sent=sent)
    whole = await client.completions.create(model=CHAT, prompt=PROMPT, max_tokens=3)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected_text(PROMPT, 3), "length")


async def test_responses(house: House, client: openai.AsyncOpenAI, sent: Sent) -> None:
    stream = await client.responses.create(model=CHAT, input=PROMPT, stream=True)
    events: list[Any] = [event async for event in stream]
    check_stream("".join(e.delta for e in events if e.type == "response.output_text.delta"), PROMPT)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == expected_text(PROMPT)
    house.only("/v1/responses", sent=sent)
    whole = await client.responses.create(model=CHAT, input=MESSAGES, max_output_tokens=3)
    assert whole.output_text == expected_text(PROMPT, 3)


async def test_embeddings_and_models(house: House, client: openai.AsyncOpenAI, sent: Sent) -> None:
    floats = await client.embeddings.create(model=EMBED, input=["one", "two"], encoding_format="float")
    assert [row.embedding for row in floats.data] == [normalised(embedding(t, 64)) for t in ("one", "two")]
    house.only("/v1/embeddings", sent=sent)
    packed = await client.embeddings.create(model=EMBED, input="one")  # asks for base64 by itself
    assert packed.data[0].embedding == pytest.approx(
        struct.unpack("<64f", struct.pack("<64f", *floats.data[0].embedding))
    )
    assert {m.id async for m in client.models.list()} == {f"{name}:latest" for name in (CHAT, EMBED, LONE)}
    assert (await client.models.retrieve(f"{LONE}:latest")).id == f"{LONE}:latest"


async def test_transcription(house: House, client: openai.AsyncOpenAI) -> None:
    sound = b"[[id:spoken]] [[n:30]]" + bytes(range(256)) * 4096
    heard = await client.audio.transcriptions.create(model=CHAT, file=("a.wav", sound))
    check_stream(heard.text, "[[id:spoken]] [[n:30]]")
    got = house.only("/v1/audio/transcriptions")
    assert got.body.count(sound) == 1 and got.model == CHAT


async def test_errors_are_the_right_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'x' not found") as told:
        await client.chat.completions.create(model="x", messages=MESSAGES)
    assert (told.value.type, told.value.status_code) == ("not_found_error", 404)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="x", messages=MESSAGES, stream=True)
    with pytest.raises(openai.NotFoundError, match="model 'x' not found"):
        await client.models.retrieve("x")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="x", input="text")
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="x", input="text")
    with pytest.raises(openai.BadRequestError, match="does not support chat") as refused:
        await client.chat.completions.create(model=EMBED, messages=MESSAGES)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=CHAT, messages=[])
    with pytest.raises(openai.NotFoundError):  # a route that Ollama has not
        await client.images.generate(model=CHAT, prompt="a cat")


async def test_a_sick_fleet_is_an_internal_server_error() -> None:
    async with open_house(retry={"rounds": 1}) as house, client_of(house) as client:
        for node in house.nodes:
            node.fail(Fault("rst", "before_head", path="/v1/chat/completions", times=None))
        with pytest.raises(openai.InternalServerError) as told:
            await client.chat.completions.create(model=CHAT, messages=MESSAGES)
        assert (told.value.status_code, told.value.type) == (503, "api_error")
        assert told.value.response.headers["retry-after"] == "2"


async def test_a_page_that_may_not_ask_is_denied(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match=r"https://evil\.test"):
        await client.with_options(default_headers={"Origin": "https://evil.test"}).models.list()


async def test_a_body_that_is_too_large_is_refused() -> None:
    large: Any = [{"role": "user", "content": "x" * 200_000}]
    async with open_house(guard={"body_limit_bytes": 100_000}) as house, client_of(house) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 100000 bytes") as told:
            await client.chat.completions.create(model=CHAT, messages=large)
        assert told.value.status_code == 413
        assert house.reached("/v1/chat/completions") == []


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
async def test_a_node_that_dies_in_its_answer_raises(
    house: House, client: openai.AsyncOpenAI, route: str
) -> None:
    for node in house.nodes:
        node.fail(Fault("rst", "after_chunks", chunks=8, path="/v1/*"))
    streams: dict[str, Any] = {
        "chat": lambda: client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True),
        "completions": lambda: client.completions.create(model=CHAT, prompt=PROMPT, stream=True),
        "responses": lambda: client.responses.create(model=CHAT, input=PROMPT, stream=True),
    }
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match="failed in mid-answer"):
        async for piece in await streams[route]():
            seen.append(piece)
    assert len(seen) == 8


async def test_leaving_a_stream_stops_the_node(house: House, client: openai.AsyncOpenAI) -> None:
    endless: Any = [{"role": "user", "content": "[[id:long]] [[n:20000]]"}]
    stream = await client.chat.completions.create(model=CHAT, messages=endless, stream=True)
    async with stream:
        assert (await anext(aiter(stream))).choices[0].delta.content == " long-0"
    node, got = await house.wait_one("/v1/chat/completions")
    assert (await node.wait_finished(got)).outcome == "cancelled"


async def test_twenty_streams_at_once_do_not_mix(house: House, client: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> None:
        prompt = f"[[id:client{number}]] [[n:60]] hello"
        message: Any = {"role": "user", "content": prompt}
        stream = await client.chat.completions.create(model=CHAT, messages=[message], stream=True)
        check_stream("".join([c.choices[0].delta.content or "" async for c in stream]), prompt)

    await asyncio.gather(*map(one, range(20)))
    assert len(house.reached("/v1/chat/completions")) == 20
