"""The official Anthropic client through the real proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from tests.e2e.house import CHAT, EMBED, House, Sent, open_house
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream, expected_text, expected_thinking

PROMPT = "[[id:hello]] [[n:40]] Say something."
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
TOOL: Any = {
    "name": "get_weather",
    "input_schema": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
}


def client_of(house: House, sent: Sent | None = None) -> anthropic.AsyncAnthropic:
    http = anthropic.DefaultAsyncHttpxClient(event_hooks=sent.hooks() if sent else {})
    return anthropic.AsyncAnthropic(base_url=house.url, api_key="none", max_retries=0, http_client=http)


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
async def client(house: House, sent: Sent) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with client_of(house, sent) as opened:
        yield opened


async def test_messages(house: House, client: anthropic.AsyncAnthropic, sent: Sent) -> None:
    async with client.messages.stream(model=CHAT, messages=MESSAGES, max_tokens=100) as stream:
        pieces = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert check_stream("".join(pieces), PROMPT) == len(pieces) == 40
    assert (final.stop_reason, final.usage.output_tokens, final.model) == ("end_turn", 40, CHAT)
    got = house.only("/v1/messages", sent=sent)
    assert got.header("anthropic-version")

    whole = await client.messages.create(model=CHAT, messages=MESSAGES, max_tokens=7)
    assert whole.content[0].type == "text"
    assert (whole.content[0].text, whole.stop_reason) == (expected_text(PROMPT, 7), "max_tokens")


async def test_the_blocking_client(house: House) -> None:
    def work() -> str:
        with (
            anthropic.Anthropic(base_url=house.url, api_key="none", max_retries=0) as client,
            client.messages.stream(model=CHAT, messages=MESSAGES, max_tokens=100) as stream,
        ):
            return "".join(stream.text_stream)

    check_stream(await asyncio.to_thread(work), PROMPT)


async def test_thinking_and_images(house: House, client: anthropic.AsyncAnthropic, sent: Sent) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
    question: Any = {"role": "user", "content": [image, {"type": "text", "text": PROMPT}]}
    whole = await client.messages.create(
        model=CHAT,
        messages=[question],
        max_tokens=2000,
        system="Be brief.",
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking == expected_thinking(PROMPT)
    assert text.type == "text" and text.text == expected_text(PROMPT)
    house.only("/v1/messages", sent=sent)


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_there_and_back(client: anthropic.AsyncAnthropic, stream: bool) -> None:
    asked: dict[str, Any] = {"model": CHAT, "max_tokens": 100, "tools": [TOOL]}
    question: Any = {"role": "user", "content": "[[id:Rome]] What is the weather?"}
    if stream:
        async with client.messages.stream(messages=[question], **asked) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await client.messages.create(messages=[question], **asked)
    [use] = answer.content
    assert (use.name, use.input, answer.stop_reason) == ("get_weather", {"city": "Rome"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "20 degrees"}
    more: Any = [
        question,
        {"role": "assistant", "content": [use.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "[[id:sunny]]"}]},
    ]
    said: Any = await client.messages.create(messages=more, **asked)
    check_stream(said.content[0].text, "[[id:sunny]]", 100)


async def test_errors_are_the_right_classes(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model 'x' not found") as told:
        await client.messages.create(model="x", messages=MESSAGES, max_tokens=5)
    body: Any = told.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    with pytest.raises(anthropic.NotFoundError):
        async with client.messages.stream(model="x", messages=MESSAGES, max_tokens=5):
            pass
    with pytest.raises(anthropic.BadRequestError, match="does not support chat"):
        await client.messages.create(model=EMBED, messages=MESSAGES, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await client.messages.create(model=CHAT, messages=MESSAGES, max_tokens=0)
    with pytest.raises(anthropic.NotFoundError):  # Ollama has no such route
        await client.messages.count_tokens(model=CHAT, messages=MESSAGES)
    with pytest.raises(anthropic.PermissionDeniedError, match=r"https://evil\.test"):
        await client.with_options(default_headers={"Origin": "https://evil.test"}).messages.create(
            model=CHAT, messages=MESSAGES, max_tokens=5
        )


async def test_a_sick_fleet_is_overloaded() -> None:
    async with open_house(retry={"rounds": 1}) as house, client_of(house) as client:
        for node in house.nodes:
            node.fail(Fault("rst", "before_head", path="/v1/messages", times=None))
        with pytest.raises(anthropic.InternalServerError) as told:
            await client.messages.create(model=CHAT, messages=MESSAGES, max_tokens=5)
        body: Any = told.value.body
        assert (told.value.status_code, body["error"]["type"]) == (503, "overloaded_error")


async def test_a_node_that_dies_in_its_answer_raises(house: House, client: anthropic.AsyncAnthropic) -> None:
    for node in house.nodes:
        node.fail(Fault("rst", "after_chunks", chunks=8, path="/v1/messages"))
    text = ""
    with pytest.raises(anthropic.APIStatusError, match="failed in mid-answer"):
        async with client.messages.stream(model=CHAT, messages=MESSAGES, max_tokens=100) as stream:
            async for piece in stream.text_stream:
                text += piece
    assert check_stream(text, PROMPT, complete=False) == 6


async def test_leaving_a_stream_stops_the_node(house: House, client: anthropic.AsyncAnthropic) -> None:
    endless: Any = [{"role": "user", "content": "[[id:long]] [[n:20000]]"}]
    async with client.messages.stream(model=CHAT, messages=endless, max_tokens=20000) as stream:
        assert await anext(aiter(stream.text_stream)) == " long-0"
    node, got = await house.wait_one("/v1/messages")
    assert (await node.wait_finished(got)).outcome == "cancelled"


async def test_twenty_streams_at_once_do_not_mix(house: House, client: anthropic.AsyncAnthropic) -> None:
    async def one(number: int) -> None:
        prompt = f"[[id:client{number}]] [[n:60]] hello"
        message: Any = {"role": "user", "content": prompt}
        async with client.messages.stream(model=CHAT, messages=[message], max_tokens=100) as stream:
            check_stream("".join([text async for text in stream.text_stream]), prompt)

    await asyncio.gather(*map(one, range(20)))
    assert len(house.reached("/v1/messages")) == 20
