"""The fake behaves as Ollama does to the real clients."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.fakes.raw import ask, request_bytes
from tests.fakes.store import FakeModel, embedding_model
from tests.fakes.tokens import StreamError, check_stream, expected_text, expected_thinking

PROMPT = "hello [[id:abc]]"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}


async def test_ollama_client_streams_and_does_not(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    client = ollama.AsyncClient(node.url)
    whole = await client.generate("llama3.2", PROMPT)
    assert whole.response == expected_text(PROMPT)
    assert whole.eval_count == 8 and whole.done_reason == "stop" and (whole.total_duration or 0) > 0
    text, last = "", None
    async for part in await client.chat(
        "LLAMA3.2", [{"role": "user", "content": PROMPT}], stream=True, options={"num_predict": 30}
    ):
        text, last = text + (part.message.content or ""), part
    assert check_stream(text, PROMPT, 30) == 30
    assert last is not None and last.done and last.done_reason == "length" and last.model == "LLAMA3.2"
    assert node.requests("/api/chat")[0].chunks == 31
    assert (await client.ps()).models[0].name == "llama3.2:latest"
    assert node.scheduler.loads == ["llama3.2"]


async def test_ollama_client_thinks_and_calls_tools(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    client = ollama.AsyncClient(node.url)
    messages: Any = [{"role": "user", "content": PROMPT}]
    thought = await client.chat("llama3.2", messages, think=True)
    assert thought.message.thinking == expected_thinking(PROMPT)
    assert thought.message.content == expected_text(PROMPT)
    parts = [part async for part in await client.chat("llama3.2", messages, tools=[TOOL], stream=True)]
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", {"city": "abc"})]


async def test_ollama_client_embeds(ollama_node: NodeFactory) -> None:
    node = await ollama_node([embedding_model("nomic-embed-text")])
    client = ollama.AsyncClient(node.url)
    answer = await client.embed("nomic-embed-text", ["one", "two"])
    assert [len(vector) for vector in answer.embeddings] == [64, 64]
    assert sum(x * x for x in answer.embeddings[0]) == pytest.approx(1)
    assert (await client.embed("nomic-embed-text", "two")).embeddings[0] == answer.embeddings[1]
    assert len((await client.embeddings("nomic-embed-text", "one")).embedding) == 64
    with pytest.raises(ollama.ResponseError, match="does not support generate"):
        await client.generate("nomic-embed-text", PROMPT)


async def test_openai_client(ollama_node: NodeFactory) -> None:
    node = await ollama_node([FakeModel("llama3.2"), embedding_model("nomic-embed-text")])
    client = openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole = await client.chat.completions.create(model="llama3.2", messages=messages)
    assert whole.choices[0].message.content == expected_text(PROMPT)
    text, usage = "", None
    async for chunk in await client.chat.completions.create(
        model="llama3.2",
        messages=messages,
        stream=True,
        max_tokens=12,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert check_stream(text, PROMPT, 12) == 12 and usage is not None and usage.completion_tokens == 12
    called: Any = await client.chat.completions.create(model="llama3.2", messages=messages, tools=[TOOL])
    assert called.choices[0].message.tool_calls[0].function.arguments == '{"city":"abc"}'
    said = [c async for c in await client.completions.create(model="llama3.2", prompt=PROMPT, stream=True)]
    assert "".join(c.choices[0].text for c in said) == expected_text(PROMPT)
    vector = await client.embeddings.create(model="nomic-embed-text", input="one")
    assert len(vector.data[0].embedding) == 64
    assert {m.id async for m in client.models.list()} == {"llama3.2:latest", "nomic-embed-text:latest"}
    assert (await client.responses.create(model="llama3.2", input=PROMPT)).output_text == expected_text(
        PROMPT
    )
    async with client.responses.stream(model="llama3.2", input=PROMPT) as stream:
        assert (await stream.get_final_response()).output_text == expected_text(PROMPT)
    heard = await client.audio.transcriptions.create(model="llama3.2", file=("a.wav", PROMPT.encode()))
    assert heard.text == expected_text(PROMPT)
    with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
        await client.chat.completions.create(model="nope", messages=messages)


async def test_anthropic_client(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    client = anthropic.AsyncAnthropic(base_url=node.url, api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole: Any = await client.messages.create(model="llama3.2", max_tokens=9, messages=messages)
    assert whole.content[0].text == expected_text(PROMPT, 9) and whole.stop_reason == "max_tokens"
    async with client.messages.stream(model="llama3.2", max_tokens=20, messages=messages) as stream:
        assert check_stream("".join([text async for text in stream.text_stream]), PROMPT, 20) == 20
    tool: Any = {"name": "weather", "input_schema": TOOL["function"]["parameters"]}
    async with client.messages.stream(
        model="llama3.2",
        max_tokens=9,
        messages=messages,
        tools=[tool],
    ) as stream:
        called: Any = await stream.get_final_message()
    assert called.stop_reason == "tool_use" and called.content[0].input == {"city": "abc"}
    with pytest.raises(anthropic.NotFoundError, match="model 'nope' not found"):
        await client.messages.create(model="nope", max_tokens=9, messages=messages)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (" abc-0 abc-2", "lost"),
        (" abc-0 abc-0", "repeated"),
        (" abc-0 xyz-1", "another request"),
        (" abc-0", "1 tokens instead of 2"),
        (" abc-0 abc-1 abc-2", "3 tokens instead of 2"),
        ("abc-0 abc-1", "space"),
    ],
)
def test_the_checker_sees_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(StreamError, match=problem):
        check_stream(text, PROMPT, 2)


async def test_two_hundred_at_once_get_their_own_tokens(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node(num_parallel=8) for _ in range(2)]

    async def one(number: int) -> int:
        prompt = f"[[id:r{number}]] [[n:20]]"
        sent = request_bytes("/api/generate", {"model": "llama3.2", "prompt": prompt})
        answer = await ask(nodes[number % 2].host_port, sent)
        return check_stream("".join(line["response"] for line in answer.lines), prompt)

    assert await asyncio.gather(*map(one, range(200))) == [20] * 200
    assert [len(node.received) for node in nodes] == [100, 100]
    assert {record.outcome for node in nodes for record in node.received} == {"completed"}
