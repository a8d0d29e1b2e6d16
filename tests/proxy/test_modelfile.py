"""Models whose Modelfile sets how they are loaded, on the real proxy."""

from __future__ import annotations

import asyncio

import aiohttp

from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy


async def test_a_model_that_others_loaded_under_its_modelfile_is_used_where_it_is(
    ollama_node: NodeFactory,
) -> None:
    model = FakeModel("llama3.2", parameters={"num_ctx": 8192})
    empty, loaded = await ollama_node([model]), await ollama_node([model])
    async with aiohttp.ClientSession() as session:
        await ask(session, f"http://{loaded.host_port}", BY_NAME["chat"], "[[n:2]] by others")
        assert loaded.scheduler.loads == ["llama3.2"]
        async with RunningProxy([empty, loaded]) as proxy:
            async with asyncio.timeout(5):
                while not proxy.sollol.fleet.modelfiles:
                    await asyncio.sleep(0.005)
            for way in (BY_NAME["chat"], BY_NAME["openai"]):
                heard = await ask(session, proxy.url, way, "[[n:2]] by the proxy")
                assert (heard.status, heard.error) == (200, None)
            async with session.get(f"{proxy.url}/sollol/decisions") as answer:
                first = (await answer.json())["requests"][-1]["decisions"][0]
    notes = {row["node"]: row["notes"][0] for row in first["candidates"]}
    assert notes == {empty.host_port: "load", loaded.host_port: "resident"}
    assert (empty.scheduler.loads, loaded.scheduler.loads) == ([], ["llama3.2"])
