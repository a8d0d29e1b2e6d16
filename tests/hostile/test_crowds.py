"""The whole table, and more connections than the proxy holds, against `sollol proxy` as a process."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.ollama_node import FakeOllama
from tests.hostile.attacks import ATTACKS
from tests.hostile.conftest import CHAT, LIMITS, POLLS, SLOTS
from tests.hostile.forms import head
from tests.hostile.process import proxy_process
from tests.hostile.wire import converse, tapped
from tests.proxy.running import RunningProxy, with_slots

CROWD = 10_000


async def test_the_whole_table_against_a_process(tmp_path: Path) -> None:
    async with (
        FakeOllama(num_parallel=SLOTS) as node,
        tapped(node.server.port) as tap,
        proxy_process(tmp_path, [with_slots(tap, SLOTS)], timeouts=LIMITS) as proxy,
    ):
        wrong = []
        for attack in ATTACKS:
            seen = await converse(proxy.port, attack.sent)
            reached = tuple((how, path) for how, path, _ in tap.requests() if path not in POLLS)
            tap.forget()
            got = tuple(answer.status for answer in seen.answers)
            if (got, reached) != (attack.answers, attack.reaches):
                wrong.append((attack.name, got, reached))
        assert wrong == []


@pytest.mark.parametrize("splice", [True, False], ids=["lane", "layers"])
async def test_beyond_the_limit_whoever_was_idle_for_longest_makes_room(splice: bool) -> None:
    limit, crowd = 20, 60
    async with (
        FakeOllama() as node,
        RunningProxy([node], splice=splice, guard={"max_connections": limit}) as proxy,
    ):
        connections = []
        for _ in range(crowd):
            connections.append(await asyncio.open_connection("127.0.0.1", proxy.port))
            connections[-1][1].write(head("GET /api/version HTTP/1.1"))
            await connections[-1][0].readuntil(b"}")
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            for reader, _ in connections[: crowd - limit]:
                assert await reader.read() == b""  # closed without a word
            async with session.post(f"{proxy.url}/api/chat", json=CHAT) as answer:
                assert answer.status == 200
        newest, writer = connections[-1]
        writer.write(head("GET /api/version HTTP/1.1"))
        assert (await newest.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        for _, writer in connections:
            writer.transport.abort()


@pytest.mark.parametrize("splice", [True, False], ids=["lane", "layers"])
async def test_who_is_served_is_not_closed_for_others(splice: bool) -> None:
    """Where all connections are in use, one more is refused or closed, and every stream goes on."""
    limit = 4
    body = {**CHAT, "stream": True}
    async with (
        FakeOllama(num_parallel=8) as node,
        RunningProxy([with_slots(node, 8)], splice=splice, guard={"max_connections": limit}) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        node.hold_tokens()
        streams = [
            asyncio.ensure_future(session.post(f"{proxy.url}/api/chat", json=body)) for _ in range(limit)
        ]
        await node.wait_received(limit, "/api/chat")
        one_more = await converse(proxy.port, b"")
        assert [answer.status for answer in one_more.answers] in ([503], [])
        node.go_on()
        for stream in streams:
            answer = await stream
            assert answer.status == 200 and b" good-2" in await answer.read()


async def test_ten_thousand_idle_connections_keep_nobody_from_being_served(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CROWD + 2000:
        pytest.skip(f"needs {CROWD + 2000} open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = 8192
    try:
        async with (
            FakeOllama() as node,
            proxy_process(tmp_path, [node.host_port], guard={"max_connections": most}) as proxy,
        ):
            crowd = []
            for _ in range(CROWD // 500):
                opening = (asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(500))
                crowd += await asyncio.gather(*opening)
            async with asyncio.timeout(60), aiohttp.ClientSession() as session:
                for reader, _ in crowd[: CROWD - most]:
                    assert await reader.read() == b""
                async with session.post(f"{proxy.url}/api/chat", json=CHAT) as answer:
                    assert answer.status == 200
            for _, writer in crowd:
                writer.transport.abort()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
