"""A conversation on the real proxy over two equal nodes: where its turns go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.fakes.ollama_node import FakeOllama
from tests.proxy.running import RunningProxy

WORDS = "all the world is a stage and the men and women merely players "
LONG = WORDS * 20  # 310 tokens: at these machines' speed worth a wait, if not for long
VERY_LONG = LONG * 12


class House:
    """Two equal nodes, each with the model loaded and measured, the proxy over them, a client."""

    def __init__(self, nodes: list[FakeOllama], proxy: RunningProxy, session: aiohttp.ClientSession) -> None:
        self.nodes, self.proxy, self.session = nodes, proxy, session
        self.newest = ""  #: id of the newest request

    async def chat(self, messages: list[dict[str, Any]], url: str = "", **more: Any) -> tuple[str, str]:
        """Ask; returns the answer and the name of the node that gave it."""
        body = {"model": "llama3.2", "messages": messages, "stream": False, **more}
        async with self.session.post(f"{url or self.proxy.url}/api/chat", json=body) as answer:
            assert answer.status == 200, await answer.text()
            self.newest = answer.headers.get("x-sollol-request-id", "")
            text = (await answer.json())["message"]["content"]
            return text, answer.headers.get("x-sollol-node", "")

    def node(self, name: str) -> FakeOllama:
        return next(node for node in self.nodes if node.host_port == name)

    def other(self, name: str) -> FakeOllama:
        return next(node for node in self.nodes if node.host_port != name)

    async def expected(self) -> dict[str, float]:
        """Tokens of the newest prompt that the decision expected in each node's cache, by the journal."""
        async with self.session.get(f"{self.proxy.url}/sollol/explain/{self.newest}") as answer:
            candidates = (await answer.json())["decisions"][0]["candidates"]
        return {candidate["node"]: candidate["features"]["cached_tokens"] for candidate in candidates}

    async def aside(self, text: str) -> str:
        """Ask something that has nothing to do with anything; returns the name of the node that answered."""
        return (await self.chat([{"role": "user", "content": text}]))[1]

    async def polled(self) -> None:
        """Return once the proxy has seen what the nodes hold now."""
        await self.proxy.sollol.watch.refresh_resident(self.proxy.sollol.fleet)


class Conversation:
    """Grows by what was answered and by another question."""

    def __init__(self, house: House, name: str) -> None:
        self.house = house
        self.messages = [{"role": "system", "content": f"{name} {LONG}"}]

    async def turn(self) -> str:
        """Ask another question; returns the name of the node that answered."""
        self.messages.append({"role": "user", "content": f"question {len(self.messages)}"})
        text, name = await self.house.chat(self.messages)
        self.messages.append({"role": "assistant", "content": text})
        return name


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with (
        FakeOllama(prefill_tok_s=200) as one,
        FakeOllama(prefill_tok_s=200) as two,
        aiohttp.ClientSession() as session,
        RunningProxy([one, two]) as proxy,
    ):
        house = House([one, two], proxy, session)
        for node in house.nodes:
            await house.chat([], node.url)
        await house.polled()
        for i in range(3):  # two at a time: one each
            homes = await asyncio.gather(*(house.aside(f"{i} {j} {LONG}") for j in range(2)))
            assert homes[0] != homes[1]
        yield house


async def two_conversations(house: House) -> dict[str, Conversation]:
    """Begun at the same time, so by one node each: by its name."""
    begun = [Conversation(house, name) for name in ("first", "second")]
    homes = await asyncio.gather(*(conversation.turn() for conversation in begun))
    assert homes[0] != homes[1]
    return dict(zip(homes, begun, strict=True))


async def test_each_conversation_stays_where_its_cache_is(house: House) -> None:
    """Whichever of the nodes would be preferred without it."""
    conversations = await two_conversations(house)
    for _ in range(3):
        for home, conversation in conversations.items():
            assert await conversation.turn() == home


async def test_a_conversation_leaves_a_node_that_is_much_busier(house: House) -> None:
    conversation = Conversation(house, "one")
    home = await conversation.turn()
    busy, other = house.node(home), house.other(home)
    received = {node: len(node.requests("/api/chat")) for node in house.nodes}
    for node in house.nodes:
        node.hold_tokens()
    asides = [asyncio.create_task(house.aside(f"{i} {VERY_LONG}")) for i in range(2)]
    for node in house.nodes:
        await node.wait_received(received[node] + 1, path="/api/chat")
    other.go_on()
    await asyncio.wait(asides, return_when=asyncio.FIRST_COMPLETED)
    assert await conversation.turn() == other.host_port
    busy.go_on()
    await asyncio.gather(*asides)


async def test_a_cache_that_was_unloaded_attracts_nobody(house: House) -> None:
    conversation = Conversation(house, "one")
    home = house.node(await conversation.turn())
    assert await conversation.turn() == home.host_port
    expected = await house.expected()
    assert expected.pop(home.host_port) > 300  # all but the new question
    assert set(expected.values()) == {0}
    await house.chat([], home.url, keep_alive=0)
    await home.wait_until(lambda: not home.scheduler.runners)
    await house.polled()
    await house.chat([], home.url)  # somebody loads it again, past the proxy
    await house.polled()
    await conversation.turn()
    assert set((await house.expected()).values()) == {0}
