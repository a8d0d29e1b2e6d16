"""Ollama's own answer decides where the proxy can only guess at the context that it would give."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.fakes.fake_agent import FakeAgent
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import GIB, FakeModel
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.fleet.conftest import until
from tests.proxy.running import RunningProxy, with_slots

SMALL = FakeModel("m", size=GIB)
PROMPT = "[[id:job]] [[n:12]] count"
both_ways = pytest.mark.parametrize("splice", [True, False], ids=["lane", "layers"])


@asynccontextmanager
async def fleet(*default_num_ctx: int | None, splice: bool) -> AsyncIterator[tuple[list[FakeOllama], str]]:
    """A node with 64 GiB and 8 slots for each default context that its OLLAMA_CONTEXT_LENGTH sets."""
    nodes, agents, known = [], [], []
    for num_ctx in default_num_ctx:
        machine: dict[str, Any] = {"vram_bytes": 64 * GIB, "num_parallel": 8, "default_num_ctx": num_ctx}
        nodes.append(await FakeOllama([SMALL], **machine).start())
        agents.append(await FakeAgent(nodes[-1]).start())
        known.append(with_slots(nodes[-1], 8) | {"agent": agents[-1].url})
    try:
        async with RunningProxy(known, splice=splice) as proxy:
            await until(lambda: all(node.report is not None for node in proxy.sollol.fleet))
            yield nodes, proxy.url
    finally:
        for each in (*nodes, *agents):
            await each.stop()


@both_ways
async def test_a_node_that_is_set_to_a_small_context_serves(splice: bool) -> None:
    async with fleet(4096, splice=splice) as (_, url), aiohttp.ClientSession() as session:
        for _ in range(2):
            heard = await ask(session, url, BY_NAME["chat"], PROMPT, model="m")
            assert (heard.status, heard.error, heard.ended) == (200, None, True)
            check_stream(heard.text, PROMPT)


@both_ways
async def test_one_that_is_not_says_so_in_its_own_words(splice: bool) -> None:
    async with fleet(None, splice=splice) as (nodes, url), aiohttp.ClientSession() as session:
        heard = await ask(session, url, BY_NAME["chat"], PROMPT, model="m")
        assert heard.status == 500
        assert "out-of-memory during startup" in str(heard.error)
        again = await ask(session, url, BY_NAME["chat"], PROMPT, model="m")
        assert (again.status, len(nodes[0].requests("/api/chat"))) == (503, 1)
        assert "was out of memory with this model" in str(again.error)


@both_ways
async def test_after_one_that_cannot_the_next_is_tried(splice: bool) -> None:
    async with fleet(None, None, 4096, splice=splice) as (nodes, url), aiohttp.ClientSession() as session:
        for _ in range(3):
            heard = await ask(session, url, BY_NAME["chat"], PROMPT, model="m")
            assert heard.status == 200
            assert heard.headers["x-sollol-node"] == nodes[2].host_port
            check_stream(heard.text, PROMPT)


async def test_a_context_that_is_named_is_not_tried_in_vain() -> None:
    async with fleet(4096, splice=True) as (nodes, url), aiohttp.ClientSession() as session:
        options = {"num_ctx": 262_144}
        heard = await ask(session, url, BY_NAME["chat"], PROMPT, model="m", options=options)
        assert (heard.status, len(nodes[0].requests("/api/chat"))) == (503, 0)
        assert "does not fit" in str(heard.error)
