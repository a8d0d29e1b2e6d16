from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from aiohttp import web

from agent.report import Disk, Gpu, Host, Ollama, Report
from proxy_addon.fleet.node import Node
from proxy_addon.one_server.pull import by_room, targets
from tests.fakes.faults import hang, reply, rst
from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.one_server.build import model, node, utc
from tests.proxy.one_server.house import house, said

MODEL = FakeModel("gemma3:270m", size=4_000_000)
BODY = {"model": "gemma3:270m"}
KEY = "registry.ollama.ai/library/gemma3:270m"


def report(gpu_free_bytes: int, disk_free_bytes: int | None = 100) -> Report:
    gpu = Gpu(
        index=0,
        name="g",
        vendor="nvidia",
        memory_total_bytes=99,
        memory_free_bytes=gpu_free_bytes,
        memory_used_bytes=0,
    )
    disk = None if disk_free_bytes is None else Disk(path="/", total_bytes=999, free_bytes=disk_free_bytes)
    return Report(
        agent_version="1",
        node_id="x",
        sampled_at=utc(2026, 8, 1),
        sample_age_s=0,
        host=Host(hostname="h", cpu_count=1, ram_total_bytes=1, ram_available_bytes=1, model_store=disk),
        gpus=[gpu],
        ollama=Ollama(url="http://h", reachable=True),
    )


def hosts(nodes: list[Node]) -> list[str]:
    return [each.host for each in nodes]


def test_by_room_takes_gpu_memory_then_disk_and_nodes_without_agent_last() -> None:
    nodes = [
        node("unknown"),
        node("small", report=report(10)),
        node("big-full", report=report(90, 5)),
        node("roomy", report=report(50, 80)),
        node("tight", report=report(50, 70)),
        node("no-disk-known", report=report(60, None)),
    ]
    assert hosts(by_room(nodes)) == ["big-full", "no-disk-known", "roomy", "tight", "small", "unknown"]
    assert hosts(by_room(nodes, size_bytes=50))[-1] == "big-full"


@pytest.mark.parametrize(
    ("replicas", "pulling", "spare"),
    [(1, ["has"], ["c", "a", "b"]), (2, ["has", "c"], ["a", "b"]), (9, ["has", "c", "a", "b"], [])],
)
def test_holders_refresh_and_the_best_are_added(replicas: int, pulling: list[str], spare: list[str]) -> None:
    up = [node("a"), node("b"), node("has", model("gemma3:270m")), node("c", report=report(9, 5000))]
    chosen, spares = targets(up, KEY, replicas)
    assert (hosts(chosen), hosts(spares)) == (pulling, spare)


def test_a_coordinator_pulls_only_where_there_is_no_ollama() -> None:
    coordinator = node("shard", kind="shard", report=report(99))
    assert hosts(targets([coordinator, node("a")], KEY, 2)[0]) == ["a"]
    assert hosts(targets([coordinator], KEY, 1)[0]) == ["shard"]


async def test_two_nodes_at_different_speeds_are_one_bar(ollama_node: NodeFactory) -> None:
    fast = await ollama_node([], remote=[MODEL], pull_bytes_s=400_000_000)
    slow = await ollama_node([], remote=[MODEL], pull_bytes_s=20_000_000)
    async with house(fast, slow, pull={"replicas": 2}) as fleet:
        rows = await fleet.stream("POST", "/api/pull", BODY)
        assert len(fleet.refreshed) == 2
        assert said(await fleet.ask("GET", "/api/tags"))["models"][0]["name"] == "gemma3:270m"
    bars = [row for row in rows if "digest" in row]
    completed = [row.get("completed", 0) for row in bars]
    assert {row["total"] for row in bars} == {MODEL.size}
    assert completed == sorted(set(completed)) and completed[0] == 0 and completed[-1] == MODEL.size
    steps = [row["status"] for row in rows if "digest" not in row]
    assert steps == ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"]
    assert fast.store.find("gemma3:270m") and slow.store.find("gemma3:270m")


async def test_one_node_that_fails_does_not_fail_the_pull(ollama_node: NodeFactory) -> None:
    well = await ollama_node([], remote=[MODEL])
    sick = await ollama_node([], remote=[])  # this one's registry does not know the model
    async with house(well, sick, pull={"replicas": 2}) as fleet:
        rows = await fleet.stream("POST", "/api/pull", BODY)
    text = "pull model manifest: file does not exist"
    assert {"status": f"{sick.host_port} failed: {text}; going on with {well.host_port}"} in rows
    assert rows[-1] == {"status": "success", "failed": [{"node": sick.host_port, "error": text}]}
    assert not any("error" in row for row in rows)


async def test_a_pull_that_fails_everywhere_ends_in_an_error_line(ollama_node: NodeFactory) -> None:
    async with house(await ollama_node([]), await ollama_node([]), pull={"replicas": 2}) as fleet:
        rows = await fleet.stream("POST", "/api/pull", BODY)
        assert rows[-1] == {"error": "pull model manifest: file does not exist"}
        assert fleet.refreshed == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refused_pull_keeps_the_nodes_status_and_words(
    ollama_node: NodeFactory, stream: bool
) -> None:
    a = await ollama_node([])
    async with house(a) as fleet:
        a.fail(reply(412, "this model needs a newer version of Ollama", path="/api/pull"))
        answer = await fleet.ask("POST", "/api/pull", {**BODY, "stream": stream})
    assert answer.status_code == 412
    assert said(answer) == {"error": "this model needs a newer version of Ollama"}


async def test_without_stream_only_the_last_status_comes(ollama_node: NodeFactory) -> None:
    a, sick = await ollama_node([], remote=[MODEL]), await ollama_node([])
    async with house(a, sick, pull={"replicas": 2}) as fleet:
        answer = await fleet.ask("POST", "/api/pull", {**BODY, "stream": False})
    assert answer.status_code == 200 and said(answer)["status"] == "success"
    assert [row["node"] for row in said(answer)["failed"]] == [sick.host_port]


async def test_without_stream_a_failure_everywhere_is_a_500(ollama_node: NodeFactory) -> None:
    async with house(await ollama_node([])) as fleet:
        answer = await fleet.ask("POST", "/api/pull", {**BODY, "stream": False})
    assert (answer.status_code, said(answer)) == (500, {"error": "pull model manifest: file does not exist"})


async def test_another_node_takes_the_place_of_one_that_is_gone(ollama_node: NodeFactory) -> None:
    gone, spare = await ollama_node([], remote=[MODEL]), await ollama_node([], remote=[MODEL])
    async with house(gone, spare) as fleet:
        fleet.node(gone).report = report(10)  # chosen first
        await gone.kill()
        rows = await fleet.stream("POST", "/api/pull", BODY)
    assert rows[0]["status"].endswith(f"; going on with {spare.host_port}")
    assert rows[-1]["status"] == "success" and spare.store.find("gemma3:270m")


async def test_another_node_takes_over_when_one_dies_in_mid_pull(ollama_node: NodeFactory) -> None:
    dying, spare = await ollama_node([], remote=[MODEL]), await ollama_node([], remote=[MODEL])
    async with house(dying, spare) as fleet:
        fleet.node(dying).report = report(10)
        dying.fail(rst("after_chunks", chunks=3, path="/api/pull"))
        rows = await fleet.stream("POST", "/api/pull", BODY)
    completed = [row.get("completed", 0) for row in rows if "digest" in row]
    assert completed == sorted(completed) and completed[-1] == MODEL.size
    assert rows[-1]["status"] == "success"
    assert [row["node"] for row in rows[-1]["failed"]] == [dying.host_port]


async def test_a_client_that_leaves_cancels_the_pull_on_every_node(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([], remote=[MODEL], pull_bytes_s=1000) for _ in range(2)]
    async with house(*nodes, pull={"replicas": 2}) as fleet:
        flow, rec = fleet.flow("POST", "/api/pull", BODY)
        await fleet.run(flow, rec)
        assert rec.stream
        assert orjson.loads(await anext(rec.stream.chunks)) == {"status": "pulling manifest"}
        await rec.stream.chunks.aclose()  # type: ignore[attr-defined]
        for each in nodes:
            [seen] = await each.wait_received(1, "/api/pull")
            assert (await each.wait_finished(seen)).outcome == "cancelled"
        assert [line async for line in rec.stream.chunks] == []
        assert fleet.refreshed == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_row_cancels_too(
    ollama_node: NodeFactory, stream: bool
) -> None:
    a = await ollama_node([], remote=[MODEL])
    a.fail(hang(path="/api/pull"))
    async with house(a) as fleet:
        flow, rec = fleet.flow("POST", "/api/pull", {**BODY, "stream": stream})
        asking = asyncio.create_task(fleet.run(flow, rec))
        [seen] = await a.wait_received(1, "/api/pull")
        rec.client_left()
        await asking
        assert flow.response is None and rec.stream is None
        await a.wait_finished(seen)
        assert not a.store.find("gemma3:270m")


async def test_the_nodes_get_the_clients_fields(ollama_node: NodeFactory) -> None:
    a = await ollama_node([], remote=[MODEL])
    async with house(a) as fleet:
        await fleet.stream("POST", "/api/pull", {"name": "gemma3:270m", "insecure": True})
    assert a.requests("/api/pull")[0].json == {"name": "gemma3:270m", "insecure": True, "stream": True}


@pytest.mark.parametrize("wanted", ["both", "unknown", "down"])
async def test_a_pull_with_a_target_goes_there(ollama_node: NodeFactory, wanted: str) -> None:
    a, b = await ollama_node([], remote=[MODEL]), await ollama_node([], remote=[MODEL])
    async with house(a, b) as fleet:
        fleet.node(b).poll_error = "connection refused" if wanted == "down" else None
        header = "10.1.1.1:11434" if wanted == "unknown" else f"{a.host_port}, {b.host_port}"
        flow, rec = fleet.flow("POST", "/api/pull", BODY, headers=[("x-sollol-target", header)])
        await fleet.run(flow, rec)
        if wanted == "both":
            assert rec.stream
            assert [orjson.loads(line) async for line in rec.stream.chunks][-1] == {"status": "success"}
            assert a.store.find("gemma3:270m") and b.store.find("gemma3:270m")
        else:
            assert flow.response and flow.response.status_code == {"unknown": 400, "down": 503}[wanted]
            assert not a.requests("/api/pull")


async def test_a_node_that_sends_rubbish_has_failed(ollama_node: NodeFactory) -> None:
    async def rubbish(_: Any) -> web.Response:
        return web.Response(body=b"[1]\n")

    app = web.Application()
    app.router.add_post("/api/pull", rubbish)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        async with house() as fleet:
            fleet.fleet.add(Node(host, port, polled_s=0.0))
            answer = await fleet.ask("POST", "/api/pull", BODY)
        assert said(answer) == {"error": "sent a line that is no JSON object: b'[1]\\n'"}
        assert answer.status_code == 502
    finally:
        await runner.cleanup()
