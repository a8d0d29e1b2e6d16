"""The rules of the node's scheduler that a router must reckon with, each seen over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from tests.fakes.engine import ApiError, keep_alive_s
from tests.fakes.faults import TEXTS
from tests.fakes.fixtures import AgentFactory, NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.raw import Answer, ask, request_bytes
from tests.fakes.scheduler import FOREVER_S
from tests.fakes.store import GIB, FakeModel, embedding_model

SMALL = [FakeModel(name, size=GIB) for name in ("a", "b", "c", "d")]


def generate(node: FakeOllama, model: str, prompt: str = "[[n:2]]", **more: Any) -> Awaitable[Answer]:
    body = {"model": model, "prompt": prompt, "stream": False, **more}
    return ask(node.host_port, request_bytes("/api/generate", body))


async def resident(node: FakeOllama) -> dict[str, dict[str, Any]]:
    rows = (await ask(node.host_port, request_bytes("/api/ps"))).json["models"]
    return {row["name"].removesuffix(":latest"): row for row in rows}


async def test_a_loading_model_is_not_listed_and_waiters_share_its_load(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.hold_loads()
    asked = [asyncio.ensure_future(generate(node, "llama3.2")) for _ in range(3)]
    await node.wait_until(lambda: node.scheduler.loading is not None)
    assert await resident(node) == {}
    node.go_on()
    assert [(await a).status for a in asked] == [200] * 3
    assert node.scheduler.loads == ["llama3.2"] and set(await resident(node)) == {"llama3.2"}


async def test_only_the_load_channel_is_bounded(ollama_node: NodeFactory) -> None:
    node = await ollama_node(SMALL, max_queue=2, vram_bytes=64 * GIB, default_num_ctx=4096)
    assert (await generate(node, "a")).status == 200
    node.hold_loads()
    loading = asyncio.ensure_future(generate(node, "b"))
    await node.wait_until(lambda: node.scheduler.loading is not None)
    queued = [asyncio.ensure_future(generate(node, "c")) for _ in range(2)]
    await node.wait_until(lambda: node.scheduler.queued == 2)
    full = await generate(node, "d")
    assert (full.status, full.json) == (503, {"error": TEXTS["busy"][1]})
    for_the_loaded = await asyncio.gather(*(generate(node, "a") for _ in range(5)))
    assert [answer.status for answer in for_the_loaded] == [200] * 5
    node.go_on()
    assert [(await asked).status for asked in (loading, *queued)] == [200] * 3
    assert node.scheduler.loads == ["a", "b", "c"]


async def test_a_load_waits_for_its_victims_work_and_blocks_those_behind(ollama_node: NodeFactory) -> None:
    node = await ollama_node(SMALL, max_loaded_models=1)
    node.hold_tokens()
    busy = asyncio.ensure_future(generate(node, "a"))
    await node.wait_until(lambda: bool(node.scheduler.runners))
    second = asyncio.ensure_future(generate(node, "b"))
    await node.wait_until(lambda: node.scheduler.runners[SMALL[0].blob].evicting)
    third = asyncio.ensure_future(generate(node, "c"))
    await node.wait_until(lambda: node.scheduler.queued == 1)
    assert not busy.done() and node.scheduler.loads == ["a"]
    node.go_on()
    await asyncio.gather(busy, second, third)
    assert node.scheduler.loads == ["a", "b", "c"] and node.scheduler.unloads == ["a", "b"]


async def test_the_victim_is_idle_with_the_shortest_session(ollama_node: NodeFactory) -> None:
    node = await ollama_node(SMALL, max_loaded_models=3, vram_bytes=64 * GIB, default_num_ctx=4096)
    for model, keep in (("a", "10m"), ("b", "1m"), ("c", "5m")):
        await generate(node, model, keep_alive=keep)
    await generate(node, "d")
    assert node.scheduler.unloads == ["b"] and set(await resident(node)) == {"a", "c", "d"}


async def test_an_additional_model_must_fit_the_first_one_need_not(ollama_node: NodeFactory) -> None:
    big = FakeModel("big", size=10 * GIB)
    node = await ollama_node([big, FakeModel("small", size=6 * GIB)], vram_bytes=8 * GIB, ram_bytes=32 * GIB)
    assert (await generate(node, "big")).status == 200
    row = (await resident(node))["big"]
    assert 0 < row["size_vram"] <= 8 * GIB < row["size"]
    assert (await generate(node, "small")).status == 200
    assert node.scheduler.unloads == ["big"]
    row = (await resident(node))["small"]
    assert row["size_vram"] == row["size"] and row["context_length"] == 4096


async def test_out_of_memory_is_a_500_after_the_load(ollama_node: NodeFactory) -> None:
    node = await ollama_node([FakeModel("huge", size=70 * GIB)], load_bytes_s=1e15)
    answer = await generate(node, "huge")
    assert (answer.status, answer.json) == (500, {"error": TEXTS["oom_startup"][1]})
    assert await resident(node) == {}


async def test_num_gpu_limits_the_offload(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    await generate(node, "llama3.2", options={"num_gpu": 0})
    assert (await resident(node))["llama3.2"]["size_vram"] == 0
    await generate(node, "llama3.2")
    assert node.scheduler.loads == ["llama3.2"], "a request without num_gpu takes what there is"
    await generate(node, "llama3.2", options={"num_gpu": 14})
    row = (await resident(node))["llama3.2"]
    assert 0 < row["size_vram"] < row["size"] and len(node.scheduler.loads) == 2


@pytest.mark.parametrize(
    ("first", "second", "loads"),
    [
        ({"num_ctx": 8192}, {"num_ctx": 8192}, 1),
        ({"num_ctx": 8192}, {}, 2),
        ({}, {"num_ctx": 4096}, 1),
        ({}, {"num_ctx": 8192}, 2),
        ({}, {"num_batch": 128}, 2),
        ({}, {"use_mmap": False}, 2),
        ({}, {"temperature": 0.1, "seed": 7, "num_predict": 3}, 1),
        ({"num_ctx": 999_999}, {"num_ctx": 131_072}, 1),
    ],
)
async def test_what_reloads(
    ollama_node: NodeFactory, first: dict[str, Any], second: dict[str, Any], loads: int
) -> None:
    node = await ollama_node(ram_bytes=64 * GIB)
    await generate(node, "llama3.2", options=first)
    await generate(node, "llama3.2", options=second)
    assert len(node.scheduler.loads) == loads


@pytest.mark.parametrize(("vram", "num_ctx"), [(8, 4096), (23, 32_768), (47, 131_072)])
async def test_the_default_context_follows_the_vram(
    ollama_node: NodeFactory, vram: int, num_ctx: int
) -> None:
    node = await ollama_node(vram_bytes=vram * GIB)
    await generate(node, "llama3.2")
    assert (await resident(node))["llama3.2"]["context_length"] == num_ctx


async def test_keep_alive_zero_unloads_once_idle(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    assert (await generate(node, "llama3.2", keep_alive=0)).json["done_reason"] == "stop"
    await node.wait_until(lambda: node.scheduler.unloads == ["llama3.2"])
    loaded = await generate(node, "llama3.2", "")
    assert loaded.json["done_reason"] == "load" and set(await resident(node)) == {"llama3.2"}
    for _ in range(2):
        assert (await generate(node, "llama3.2", "", keep_alive=0)).json["done_reason"] == "unload"
        await node.wait_until(lambda: len(node.scheduler.unloads) == 2)


async def test_a_session_expires(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    await generate(node, "llama3.2", keep_alive="10ms")
    await node.wait_until(lambda: node.scheduler.unloads == ["llama3.2"])
    assert await resident(node) == {}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (30, 30),
        (0, 0),
        (-1, FOREVER_S),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("-1m", FOREVER_S),
        ("0", 0),
    ],
)
def test_keep_alive_forms(value: object, seconds: float | None) -> None:
    assert keep_alive_s(value) == seconds


async def test_keep_alive_without_a_unit_is_refused(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    answer = await generate(node, "llama3.2", keep_alive="-1")
    assert (answer.status, answer.json) == (400, {"error": 'time: missing unit in duration "-1"'})
    with pytest.raises(ApiError, match="invalid duration"):
        keep_alive_s("soon")


async def test_slots_limit_what_runs_at_once(ollama_node: NodeFactory) -> None:
    node = await ollama_node(num_parallel=2)
    node.hold_tokens()
    asked = [asyncio.ensure_future(generate(node, "llama3.2")) for _ in range(4)]
    await node.wait_until(lambda: any(len(r.waiting) == 2 for r in node.scheduler.runners.values()))
    runner = next(iter(node.scheduler.runners.values()))
    assert runner.decoding == 2
    node.go_on()
    assert [(await a).status for a in asked] == [200] * 4
    assert runner.references == runner.decoding == 0 and len(runner.free) == 2


async def test_an_embedding_model_has_one_slot(ollama_node: NodeFactory) -> None:
    node = await ollama_node([embedding_model("embedder")], num_parallel=4)
    sent = request_bytes("/api/embed", {"model": "embedder", "input": "x"})
    assert (await ask(node.host_port, sent)).status == 200
    assert next(iter(node.scheduler.runners.values())).parallel == 1


async def test_a_cached_prefix_counts_but_costs_nothing(ollama_node: NodeFactory) -> None:
    node = await ollama_node(prefill_tok_s=1000.0)
    first = (await generate(node, "llama3.2", "word " * 400)).json
    again = (await generate(node, "llama3.2", "word " * 400)).json
    assert first["prompt_eval_count"] == again["prompt_eval_count"] == 500
    assert first["prompt_eval_duration"] == 500 * 50_000 and again["prompt_eval_duration"] == 50_000
    assert first["eval_duration"] == 8 * 1_000_000


async def test_leaving_cancels_a_generation(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    asked = asyncio.ensure_future(generate(node, "llama3.2", "[[n:99999]]"))
    await node.wait_until(lambda: any(r.decoding for r in node.scheduler.runners.values()))
    asked.cancel()
    record = await node.wait_finished(node.received[0])
    assert record.outcome == "cancelled"
    assert (await generate(node, "llama3.2")).status == 200 and node.scheduler.loads == ["llama3.2"]


async def test_leaving_kills_a_load(ollama_node: NodeFactory) -> None:
    node = await ollama_node([FakeModel("slow", size=GIB), FakeModel("quick", size=1)], load_bytes_s=1000.0)
    asked = asyncio.ensure_future(generate(node, "slow"))
    await node.wait_until(lambda: node.scheduler.loading is not None)
    asked.cancel()
    await node.wait_until(lambda: node.scheduler.loading is None)
    assert (await generate(node, "quick")).status == 200
    assert set(await resident(node)) == {"quick"}


async def test_ps_stalls_while_a_runner_is_closed(ollama_node: NodeFactory) -> None:
    node = await ollama_node(unload_s=1.0)
    await generate(node, "llama3.2", keep_alive=0)
    assert await resident(node) == {}, "answered only after the unload"
    assert node.scheduler.unloads == ["llama3.2"]


async def test_copies_share_a_runner_under_the_name_that_loaded_it(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    sent = request_bytes("/api/copy", {"source": "llama3.2", "destination": "mine"})
    assert (await ask(node.host_port, sent)).status == 200
    await generate(node, "mine")
    await generate(node, "llama3.2")
    assert node.scheduler.loads == ["mine"] and set(await resident(node)) == {"mine"}


async def test_the_agent_reports_what_the_node_holds(
    ollama_node: NodeFactory, fake_agent: AgentFactory
) -> None:
    node = await ollama_node()
    agent = await fake_agent(node)
    await generate(node, "llama3.2")
    report = (await ask(agent.host_port, request_bytes("/v1/report"))).json
    row = (await resident(node))["llama3.2"]
    assert report["gpus"][0]["memory_used_bytes"] == row["size_vram"]
    assert [r["name"] for r in report["ollama"]["resident"]] == ["llama3.2:latest"]
    assert report["ollama"]["requests_in_flight"] is None, "no proxy is connected"
    assert report["ollama"]["reachable"] is True
    assert (await ask(agent.host_port, request_bytes("/healthz"))).json == {"status": "ok"}
    agent.not_ready = "no sample yet"
    assert (await ask(agent.host_port, request_bytes("/v1/report"))).status == 503
