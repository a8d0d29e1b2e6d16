"""LangChain's Ollama classes through the real proxy."""

from __future__ import annotations

import asyncio

import ollama
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

from tests.e2e.house import CHAT, EMBED, LONE, House
from tests.fakes.engine import embedding, normalised
from tests.fakes.tokens import check_stream, expected_text

PROMPT = "[[id:hello]] [[n:40]] Say something."


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"[[id:{city}.sunny]] 20 degrees"


async def test_chat(house: House) -> None:
    def build() -> ChatOllama:
        return ChatOllama(
            model=CHAT, base_url=house.url, temperature=0, num_ctx=4096, validate_model_on_init=True
        )

    chat = await asyncio.to_thread(build)  # asks for the models and pulls none
    whole = await chat.ainvoke(PROMPT)
    assert whole.content == expected_text(PROMPT)
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] == 40
    blocking = await asyncio.to_thread(chat.invoke, PROMPT)
    assert blocking.content == expected_text(PROMPT)
    pieces = [str(piece.content) async for piece in chat.astream(PROMPT)]
    check_stream("".join(pieces), PROMPT)
    assert len([piece for piece in pieces if piece]) == 40
    pieces = await asyncio.to_thread(lambda: [str(piece.content) for piece in chat.stream(PROMPT)])
    check_stream("".join(pieces), PROMPT)
    for _, got in house.reached("/api/chat"):
        assert got.json["options"] == {"temperature": 0.0, "num_ctx": 4096}


async def test_a_batch_does_not_mix(house: House) -> None:
    prompts = [f"[[id:item{number}]] [[n:60]] hello" for number in range(12)]
    answers = await ChatOllama(model=CHAT, base_url=house.url).abatch(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        check_stream(str(answer.content), prompt)


async def test_tools_there_and_back(house: House) -> None:
    chat = ChatOllama(model=CHAT, base_url=house.url).bind_tools([get_weather])
    question = HumanMessage("[[id:Rome]] What is the weather?")
    asked = await chat.ainvoke([question])
    [call] = asked.tool_calls  # type: ignore[attr-defined]
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    said = await chat.ainvoke([question, asked, result])
    check_stream(str(said.content), "[[id:Rome.sunny]]")


async def test_completion_and_embeddings(house: House) -> None:
    llm = OllamaLLM(model=LONE, base_url=house.url)
    check_stream(await llm.ainvoke(PROMPT), PROMPT)
    check_stream("".join([piece async for piece in llm.astream(PROMPT)]), PROMPT)
    embeddings = OllamaEmbeddings(model=EMBED, base_url=house.url)
    vectors = await embeddings.aembed_documents(["one", "two"])
    assert vectors == [pytest.approx(normalised(embedding(text, 64))) for text in ("one", "two")]
    assert await asyncio.to_thread(embeddings.embed_query, "one") == pytest.approx(vectors[0])


async def test_an_unknown_model_raises(house: House) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'x' not found"):
        await ChatOllama(model="x", base_url=house.url).ainvoke(PROMPT)
