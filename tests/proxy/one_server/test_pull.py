from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from aiohttp import web

from agent.report import Disk, Gpu, Host, Ollama, Report
from proxy_addon import timeouts
from proxy_addon.fleet.node import Node
from proxy_addon.one_server.pull import by_room, targets
from tests.fakes.faults import hang, reply, rst
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
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


def to(*fakes: FakeOllama) -> list[tuple[str, str]]:
    """The header of a pull that names its nodes."""
    return [("x-sollol-target", ", ".join(fake.host_port for fake in fakes))]


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


@pytest.mark.parametrize("stream", [True, False])
async def test_the_last_node_that_is_well_takes_the_place_of_all_that_are_gone(
    ollama_node: NodeFactory, stream: bool
) -> None:
    """Of none of them the polls knew when the pull came; of one they do when its turn comes."""
    gone = [await ollama_node([], remote=[MODEL]) for _ in range(3)]
    well = await ollama_node([], remote=[MODEL])
    async with house(*gone, well) as fleet:
        for memory_bytes, each in enumerate(gone, start=1):
            fleet.node(each).report = report(memory_bytes)  # all are better than ``well``
            await each.kill()
        if not stream:
            answer = await fleet.ask("POST", "/api/pull", {**BODY, "stream": False})
            assert answer.status_code == 200
            last = said(answer)
        else:
            rows = await fleet.stream("POST", "/api/pull", BODY)
            assert rows[2]["status"].endswith(f"; going on with {well.host_port}")
            last = rows[-1]
    assert last["status"] == "success" and well.store.find("gemma3:270m")
    assert {row["node"] for row in last["failed"]} == {each.host_port for each in gone}


async def test_a_spare_that_is_known_to_be_down_by_then_is_passed_over(ollama_node: NodeFactory) -> None:
    dying, lost, spare = [await ollama_node([], remote=[MODEL], pull_bytes_s=1000) for _ in range(3)]
    async with house(dying, lost, spare) as fleet:
        fleet.node(dying).report, fleet.node(lost).report = report(20), report(10)
        flow, rec = fleet.flow("POST", "/api/pull", BODY)
        await fleet.run(flow, rec)
        assert rec.stream
        lost.fail(hang(path="/api/pull"))  # 30 s would be lost with it
        fleet.down(lost, "no answer in time")
        spare.pull_bytes_s = 1e9
        await dying.kill()
        rows = [orjson.loads(line) async for line in rec.stream.chunks]
    assert rows[-1]["status"] == "success" and spare.store.find("gemma3:270m")
    assert [row["node"] for row in rows[-1]["failed"]] == [dying.host_port, lost.host_port]
    assert not lost.requests("/api/pull")


@pytest.mark.parametrize("end", ["killed", "reset", "lost without a word"])
async def test_another_node_takes_over_when_one_dies_in_mid_pull(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(timeouts, "LOST_IDLE_S", 0.05)
    dying, spare = await ollama_node([], remote=[MODEL]), await ollama_node([], remote=[MODEL])
    async with house(dying, spare) as fleet:
        fleet.node(dying).report = report(10)
        fault = rst if end == "reset" else hang
        dying.fail(fault("after_chunks", chunks=3, path="/api/pull"))
        flow, rec = fleet.flow("POST", "/api/pull", BODY)
        await fleet.run(flow, rec)
        assert rec.stream
        rows: list[dict[str, Any]] = []
        while end != "reset" and not (rows and rows[-1].get("completed")):
            rows.append(orjson.loads(await anext(rec.stream.chunks)))
        if end == "killed":
            await dying.kill()
        elif end == "lost without a word":
            fleet.down(dying, "no answer in time")
        rows += [orjson.loads(line) async for line in rec.stream.chunks]
    completed = [row.get("completed", 0) for row in rows if "digest" in row]
    assert completed == sorted(completed) and completed[-1] == MODEL.size
    assert rows[-1]["status"] == "success" and spare.store.find("gemma3:270m")
    assert [row["node"] for row in rows[-1]["failed"]] == [dying.host_port]


async def test_a_node_that_answers_polls_may_be_silent_in_mid_pull(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LOST_IDLE_S", 0.01)
    slow, other = await ollama_node([], remote=[MODEL], pull_bytes_s=1e6), await ollama_node([])
    async with house(slow, other) as fleet:
        fleet.node(slow).report = report(10)
        rows = await fleet.stream("POST", "/api/pull", BODY)
    assert rows[-1] == {"status": "success"} and not other.requests("/api/pull")


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


async def test_a_pull_with_targets_goes_there(ollama_node: NodeFactory) -> None:
    a, b, other = [await ollama_node([], remote=[MODEL]) for _ in range(3)]
    async with house(a, b, other) as fleet:
        rows = await fleet.stream("POST", "/api/pull", BODY, headers=to(a, b))
    assert rows[-1] == {"status": "success"}
    assert a.store.find("gemma3:270m") and b.store.find("gemma3:270m")
    assert not other.requests("/api/pull")


async def test_an_unknown_target_is_refused_before_anybody_pulls(ollama_node: NodeFactory) -> None:
    a = await ollama_node([], remote=[MODEL])
    async with house(a) as fleet:
        headers = [("x-sollol-target", f"{a.host_port},10.1.1.1:11434")]
        answer = await fleet.ask("POST", "/api/pull", BODY, headers=headers)
    assert answer.status_code == 400 and not a.requests("/api/pull")


@pytest.mark.parametrize("known", [True, False])
async def test_a_target_that_is_down_keeps_no_other_from_pulling(
    ollama_node: NodeFactory, known: bool
) -> None:
    """Whether the polls have noticed yet makes no difference."""
    well, dead, other = [await ollama_node([], remote=[MODEL]) for _ in range(3)]
    async with house(well, dead, other) as fleet:
        await dead.kill()
        if known:
            fleet.down(dead, "it refused the connection")
        rows = await fleet.stream("POST", "/api/pull", BODY, headers=to(dead, well))
    assert rows[-1]["status"] == "success" and well.store.find("gemma3:270m")
    assert [row["node"] for row in rows[-1]["failed"]] == [dead.host_port]
    assert not other.requests("/api/pull")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("known", [True, False])
async def test_a_pull_whose_targets_are_all_down_says_so(
    ollama_node: NodeFactory, known: bool, stream: bool
) -> None:
    dead, other = await ollama_node([], remote=[MODEL]), await ollama_node([], remote=[MODEL])
    async with house(dead, other) as fleet:
        await dead.kill()
        if known:
            fleet.down(dead, "it refused the connection")
        answer = await fleet.ask("POST", "/api/pull", {**BODY, "stream": stream}, headers=to(dead))
    why = "it refused the connection" if known else "connection refused"
    assert said(answer) == {"error": f"{dead.host_port} failed: {why}"}
    assert answer.status_code == (503 if known else 502)
    assert not other.requests("/api/pull")


@pytest.mark.parametrize("sent", [b"[1]\n", b"1" * 4_000_000])
async def test_a_node_that_sends_rubbish_has_failed(sent: bytes) -> None:
    async def rubbish(_: Any) -> web.Response:
        return web.Response(body=sent)

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
        what = "is no JSON object: b'[1]\\n'" if sent == b"[1]\n" else "is too long"
        assert said(answer) == {"error": f"sent a line that {what}"}
        assert answer.status_code == 502
    finally:
        await runner.cleanup()
