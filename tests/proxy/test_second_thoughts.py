"""What a node has not begun to answer is taken back when another one would be done far sooner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from proxy_addon import record
from proxy_addon.failover import Failover
from proxy_addon.placement import waits
from proxy_addon.retry import Budget
from proxy_addon.second_thoughts import SecondThoughts
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.faults import rst
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, Heard, Way, ask
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = "[[id:job]] [[n:12]] count"
CHAT = BY_NAME["chat"]
WAYS = [CHAT, BY_NAME["openai"], BY_NAME["anthropic"], BY_NAME["chat-whole"]]


class Pair:
    """The node that is asked first, another one that is free, the proxy over both, a client."""

    def __init__(self, proxy: RunningProxy, session: aiohttp.ClientSession, *nodes: FakeOllama) -> None:
        self.proxy, self.session, (self.first, self.other, *self.more) = proxy, session, nodes
        self.thoughts = next(addon for addon in proxy.sollol.addons if isinstance(addon, SecondThoughts))

    def ask(self, way: Way) -> asyncio.Task[Heard]:
        return asyncio.create_task(ask(self.session, self.proxy.url, way, PROMPT))

    def known(self, node: FakeOllama) -> Any:
        """What the proxy knows of ``node``."""
        return self.proxy.sollol.fleet.nodes[node.host_port]

    async def attempts(self) -> list[dict[str, Any]]:
        """Those of the only request, from the journal."""
        async with self.session.get(f"{self.proxy.url}/sollol/decisions") as answer:
            (entry,) = (await answer.json())["requests"]
            return list(entry["attempts"])

    async def load(self, node: FakeOllama, **more: Any) -> None:
        """Ask ``node`` itself to load its model, or not to keep it."""
        body = {"model": "llama3.2", **more}
        async with self.session.post(f"{node.url}/api/generate", json=body) as answer:
            await answer.read()
        async with asyncio.timeout(10):
            while bool(self.known(node).resident) is (more.get("keep_alive") == 0):
                await asyncio.sleep(0.01)

    async def looks(self, times: int) -> None:
        """Return once second thoughts were given to whoever waits, so many times from now."""
        thoughts: Any = self.thoughts
        look, left, done = thoughts._first_to_move, times, asyncio.Event()

        def counted(*args: Any) -> Any:
            nonlocal left
            found, left = look(*args), left - 1
            if not left:
                done.set()
            return found

        thoughts._first_to_move = counted
        async with asyncio.timeout(30):
            await done.wait()
        thoughts._first_to_move = look


@asynccontextmanager
async def running(size: int) -> AsyncIterator[Pair]:
    nodes = [await FakeOllama().start() for _ in range(size)]
    agents = [await FakeAgent(node).start() for node in nodes]
    known = [
        {"host": "127.0.0.1", "port": node.server.port, "agent": agent.url}
        for node, agent in zip(nodes, agents, strict=True)
    ]
    async with RunningProxy(known) as proxy, aiohttp.ClientSession() as session:
        async with asyncio.timeout(10):
            while any(node.report is None for node in proxy.sollol.fleet):
                await asyncio.sleep(0.01)
        yield Pair(proxy, session, *nodes)
    for each in (*agents, *nodes):
        await each.stop()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running(2) as pair:
        yield pair


def whole(heard: Heard) -> None:
    """The client saw a complete answer and nothing else."""
    assert (heard.status, heard.error, heard.broken, heard.ended) == (200, None, False, True)
    check_stream(heard.text, PROMPT)


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_a_request_on_a_node_whose_load_ends_on_the_cpu_is_answered_by_another(
    pair: Pair, way: Way
) -> None:
    pair.first.spec.gpu_lost = True
    pair.first.hold_tokens()
    heard = await pair.ask(way)
    whole(heard)
    assert heard.headers["x-sollol-node"] == pair.other.host_port
    assert heard.headers["x-sollol-attempts"] == "2"
    (taken,) = pair.first.requests(way.path)
    assert (await pair.first.wait_finished(taken)).outcome == "cancelled"
    node = pair.known(pair.first)
    assert (node.health.failures, node.health.reason, node.flights) == (0, None, set())
    assert node.up(asyncio.get_running_loop().time())
    moved, done = await pair.attempts()
    assert (moved["outcome"], done["outcome"]) == ("moved", "ok")
    assert f"{pair.first.host_port} runs 100% of llama3.2 on its CPU: " in moved["detail"]
    assert f" s on {pair.other.host_port}" in moved["detail"]
    async with pair.session.get(f"{pair.proxy.url}/metrics") as answer:
        assert 'sollol_retries_total{reason="moved"} 1.0' in await answer.text()


async def test_a_request_behind_a_load_that_is_stuck_is_answered_by_another(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "OVERRUN", 10.0)  # else it takes twenty seconds to be sure
    pair.first.hold_loads()
    heard = await pair.ask(CHAT)
    whole(heard)
    assert heard.headers["x-sollol-node"] == pair.other.host_port
    moved, _ = await pair.attempts()
    assert moved["outcome"] == "moved" and "is still loading llama3.2" in moved["detail"]


async def test_a_move_costs_neither_the_budget_nor_a_later_failovers_turn(pair: Pair) -> None:
    pair.first.spec.gpu_lost = True
    pair.first.hold_tokens()
    pair.other.fail(rst("before_head", path=CHAT.path))
    failover = next(addon for addon in pair.proxy.sollol.addons if isinstance(addon, Failover))
    failover.budget = Budget(0.0, 0.0)
    asking = pair.ask(CHAT)
    await pair.other.wait_received(1, path=CHAT.path)
    pair.first.go_on()
    whole(await asking)
    assert [each["outcome"] for each in await pair.attempts()] == ["moved", "died", "ok"]


async def test_a_request_stays_where_another_node_is_not_clearly_better(pair: Pair) -> None:
    pair.other.spec.gpu_lost = pair.first.spec.gpu_lost = True
    await pair.load(pair.other)  # just as badly, but it need not load it
    pair.first.hold_tokens()
    asking = pair.ask(CHAT)
    await pair.first.wait_received(1, path=CHAT.path)
    await pair.looks(3)
    pair.first.go_on()
    heard = await asking
    whole(heard)
    assert heard.headers["x-sollol-attempts"] == "1"
    assert not pair.other.requests(CHAT.path)


async def test_an_answer_that_has_begun_stays_where_it_is(pair: Pair) -> None:
    pair.first.spec.gpu_lost = True
    body = CHAT.body("[[id:long]] [[n:100000]]")
    async with pair.session.post(pair.proxy.url + CHAT.path, json=body) as answer:
        await answer.content.readline()
        pair.first.hold_tokens()
        ((flow,),) = pair.proxy.sollol.dispatch.in_flight.values()
        later_s = asyncio.get_running_loop().time() + 60
        rec = record.of(flow)
        assert rec is not None and pair.thoughts._first_to_move([(flow, rec)], later_s) is None
        rec.first_byte_s, first_byte_s = None, rec.first_byte_s  # else it would have been worth it
        assert pair.thoughts._better(rec, later_s) is not None
        rec.first_byte_s = first_byte_s
        pair.first.go_on()
        assert await answer.content.readline()
    assert not pair.other.requests(CHAT.path)


async def test_a_request_is_not_moved_twice() -> None:
    async with running(3) as pair:
        (third,) = pair.more
        for node in (pair.first, pair.other, third):
            node.spec.gpu_lost = True
        await pair.load(third)  # as badly as they will
        pair.first.hold_tokens()
        pair.other.hold_tokens()
        asking = pair.ask(CHAT)
        await pair.other.wait_received(1, path=CHAT.path)
        third.spec.gpu_lost = False
        await pair.load(third, keep_alive=0)  # what was loaded badly goes: by now it would do well
        await pair.looks(3)
        pair.other.go_on()
        heard = await asking
        whole(heard)
        assert heard.headers["x-sollol-attempts"] == "2"
        assert heard.headers["x-sollol-node"] == pair.other.host_port
        assert not third.requests(CHAT.path)
