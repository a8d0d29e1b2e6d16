"""Pytest fixtures over the fakes, made known to every test by ``tests/conftest.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.fakes.fake_agent import FakeAgent
from tests.fakes.ollama_node import FakeOllama

NodeFactory = Callable[..., Awaitable[FakeOllama]]
AgentFactory = Callable[..., Awaitable[FakeAgent]]


@pytest.fixture
async def ollama_node() -> AsyncIterator[NodeFactory]:
    """Give a factory of started nodes (arguments of :class:`FakeOllama`), stopped at the test's end."""
    nodes: list[FakeOllama] = []

    async def make(*args: object, **kwargs: object) -> FakeOllama:
        node = await FakeOllama(*args, **kwargs).start()  # type: ignore[arg-type]
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        await node.stop()


@pytest.fixture
async def fake_agent() -> AsyncIterator[AgentFactory]:
    """Give a factory of started agents of fake nodes, stopped at the test's end."""
    agents: list[FakeAgent] = []

    async def make(node: FakeOllama, **kwargs: str) -> FakeAgent:
        agent = await FakeAgent(node, **kwargs).start()
        agents.append(agent)
        return agent

    yield make
    for agent in agents:
        await agent.stop()
