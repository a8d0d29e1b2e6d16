"""Pytest fixtures over the fakes, made known to every test by ``tests/conftest.py``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.fakes.ollama_node import FakeOllama

NodeFactory = Callable[..., Awaitable[FakeOllama]]


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
