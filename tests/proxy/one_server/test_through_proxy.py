"""The same through the real proxy with the clients that people have."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import ollama
import openai
import pytest

from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.running import RunningProxy

MODEL = FakeModel("gemma3:270m", size=4_000_000)
MEGABYTE = bytes(range(256)) * 4096


async def test_listing_showing_copying_deleting(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(["llama3.2"]), await ollama_node(["llama3.2", "qwen3"])
    async with RunningProxy([a, b]) as proxy:
        client = ollama.AsyncClient(proxy.url)
        assert {row.model for row in (await client.list()).models} == {"llama3.2:latest", "qwen3:latest"}
        assert (await client.show("qwen3")).capabilities
        await client.copy("llama3.2", "mine")
        assert a.store.find("mine") and b.store.find("mine")
        await client.delete("llama3.2")
        assert {row.model for row in (await client.list()).models} == {"mine:latest", "qwen3:latest"}
        with pytest.raises(ollama.ResponseError, match=r"model 'llama3\.2' not found"):
            await client.show("llama3.2")
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none") as sdk:
            assert [row.id async for row in sdk.models.list()] == ["mine:latest", "qwen3:latest"]
            assert (await sdk.models.retrieve("qwen3")).owned_by == "library"
            with pytest.raises(openai.NotFoundError, match="model 'x' not found"):
                await sdk.models.retrieve("x")


async def test_head_requests_leave_the_connection_usable(ollama_node: NodeFactory) -> None:
    async with (
        RunningProxy([await ollama_node()]) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session,
    ):
        for path in ("/", "/api/version", "/api/tags", f"/api/blobs/sha256:{'0' * 64}"):
            async with session.head(proxy.url + path) as head:
                assert head.status == (404 if "blobs" in path else 200) and await head.read() == b""
        async with session.get(proxy.url) as root:
            assert await root.text() == "Ollama is running"


async def test_a_pull_onto_two_nodes_is_one_pull_and_usable_at_once(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([], remote=[MODEL], pull_bytes_s=speed) for speed in (1e8, 3e7)]
    async with RunningProxy(nodes, pull={"replicas": 2}) as proxy:
        client = ollama.AsyncClient(proxy.url)
        rows = [row async for row in await client.pull("gemma3:270m", stream=True)]
        completed = [row.completed or 0 for row in rows if row.digest]
        assert completed == sorted(completed) and completed[-1] == MODEL.size
        assert rows[-1].status == "success"
        assert (await client.generate("gemma3:270m", "hello")).done
        await client.generate("gemma3:270m", "", keep_alive=0)
        assert (await client.ps()).models == []
        assert (await client.pull("gemma3:270m")).status == "success"
        with pytest.raises(ollama.ResponseError, match="file does not exist"):
            await client.pull("no-such-model")
        with pytest.raises(ollama.ResponseError, match="file does not exist"):
            [row async for row in await client.pull("no-such-model", stream=True)]
    assert all(node.store.find("gemma3:270m") for node in nodes)


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_a_pull_ends_it_on_every_node(ollama_node: NodeFactory, stream: bool) -> None:
    nodes = [await ollama_node([], remote=[MODEL], pull_bytes_s=100) for _ in range(2)]
    async with RunningProxy(nodes, pull={"replicas": 2}) as proxy, aiohttp.ClientSession() as session:
        body = {"model": "gemma3:270m", "stream": stream}
        if stream:
            async with session.post(f"{proxy.url}/api/pull", json=body) as answer:
                assert b"pulling manifest" in await answer.content.readline()
        else:
            with pytest.raises(TimeoutError):
                await session.post(
                    f"{proxy.url}/api/pull", json=body, timeout=aiohttp.ClientTimeout(total=0.3)
                )
        for node in nodes:
            [seen] = await node.wait_received(1, "/api/pull")
            assert (await node.wait_finished(seen)).outcome == "cancelled"


async def test_a_model_is_created_from_a_file(ollama_node: NodeFactory, tmp_path: Path) -> None:
    nodes = [await ollama_node([]) for _ in range(3)]
    weights = tmp_path / "model.gguf"
    weights.write_bytes(MEGABYTE * 3)
    async with RunningProxy(nodes) as proxy:
        client = ollama.AsyncClient(proxy.url)
        digest = await client.create_blob(weights)
        assert await client.create_blob(weights) == digest  # is there already
        assert (await client.create("mine", files={"model.gguf": digest})).status == "success"
        assert [row.model for row in (await client.list()).models] == ["mine:latest"]
        assert (await client.generate("mine", "hello")).done
    assert [len(node.requests(f"/api/blobs/{digest}", "POST")) for node in nodes].count(1) == 1


async def test_a_large_blob_streams_through(ollama_node: NodeFactory) -> None:
    a = await ollama_node([])
    digest = f"sha256:{hashlib.sha256(MEGABYTE * 64).hexdigest()}"

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(64):
            if i == 32:  # the node has begun to read, long before the end
                await a.wait_until(lambda: bool(a.requests(method="POST")))
            yield MEGABYTE

    async with (
        RunningProxy([a], guard={"body_limit_bytes": 1 << 20}) as proxy,
        aiohttp.ClientSession() as session,
        session.post(f"{proxy.url}/api/blobs/{digest}", data=pieces()) as answer,
    ):
        assert answer.status == 201
    assert a.store.blobs == {digest: 64 << 20}


async def test_account_requests_reach_the_signed_in_node(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(signed_in=False), await ollama_node()
    for pinned, status, field in ((b, 200, "email"), (a, 401, "signin_url")):
        async with (
            RunningProxy([a, b], signed_in_node=pinned.host_port) as proxy,
            aiohttp.ClientSession() as session,
            session.post(f"{proxy.url}/api/me") as me,
        ):
            assert (me.status, field in await me.json()) == (status, True)


async def test_a_fleet_that_is_down_says_so(ollama_node: NodeFactory) -> None:
    a = await ollama_node()
    await a.kill()
    async with RunningProxy([a]) as proxy:
        client = ollama.AsyncClient(proxy.url)
        with pytest.raises(
            ollama.ResponseError, match=rf"no node of the fleet answers: {a.host_port} \("
        ) as told:
            await client.list()
    assert told.value.status_code == 503
