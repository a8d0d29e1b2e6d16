"""Several real worker processes behind one port: all serve, one may die, and each answers for all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy_addon import access
from proxy_addon.workers import merge
from proxy_addon.workers.worker import Worker
from tests.fakes.fixtures import NodeFactory
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.processes import Proxy, proxy
from tests.proxy.test_upgrade import Load, arguments, under_load

PROMPT = "[[id:workers]] [[n:5]]"


async def get(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.json()


def workers_of(running: Proxy) -> set[int]:
    return {child.pid for child in psutil.Process(running.process.pid).children()}


async def until_both_have_served(load: Load) -> list[dict[str, Any]]:
    """The status's rows of the workers, once each of them has served something."""
    while True:
        rows: list[dict[str, Any]] = (await get(f"{load.url}/sollol/status"))["workers"]
        if len(rows) == 2 and all(row["requests"] for row in rows):
            return rows


async def test_all_serve_and_each_answers_for_all(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node), "--workers", "2") as running:
        async with under_load(running.url) as load:
            await until_both_have_served(load)
            await load.stop()
        asked = len(node.requests("/api/chat"))
        for _ in range(8):  # fresh connections, which go to either
            assert (await get(f"{running.url}/sollol/status"))["requests"] == asked
            (row,) = (await get(f"{running.url}/sollol/nodes"))["nodes"]
            assert row["served"] == asked
        async with aiohttp.ClientSession() as session:
            heard = await ask(session, running.url, BY_NAME["chat"], PROMPT)
        request_id = heard.headers["x-sollol-request-id"]
        for _ in range(8):
            assert (await get(f"{running.url}/sollol/explain/{request_id}"))["id"] == request_id
            listed = (await get(f"{running.url}/sollol/decisions?limit=5"))["requests"]
            assert len(listed) == 5 and listed[0]["id"] == request_id
        async with aiohttp.ClientSession() as session, session.get(f"{running.url}/metrics") as response:
            families = {f.name: f for f in text_string_to_metric_families(await response.text())}
        done = Counter[str]()
        for sample in families["sollol_requests"].samples:
            if sample.name == "sollol_requests_total" and sample.labels["host"] != "none":
                done[sample.labels["worker"]] += int(sample.value)
        assert set(done) == {"1", "2"} and done.total() == asked + 1


async def test_one_that_is_killed_is_started_again_and_the_others_serve(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    async with (
        proxy(tmp_path, *arguments(node), "--workers", "2") as running,
        aiohttp.ClientSession() as session,
    ):
        node.hold_tokens()
        before = workers_of(running)
        carried = asyncio.create_task(ask(session, running.url, BY_NAME["generate"], PROMPT))
        await node.wait_received(1, path="/api/generate")
        rows = (await get(f"{running.url}/sollol/status"))["workers"]
        (victim,) = [row["pid"] for row in rows if not row["in_flight"]]
        os.kill(victim, signal.SIGKILL)
        await running.said("has ended with status -9; it is started again")
        await running.said("ready: 1 of 1 nodes up", 3)
        node.go_on()
        assert (await carried).ended
        after = workers_of(running)
        assert len(after) == 2 and len(after & before) == 1 and victim not in after
        assert len((await get(f"{running.url}/sollol/status"))["workers"]) == 2


async def test_who_has_connected_to_a_dead_worker_is_served_by_its_successor(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node), "--workers", "2") as running:
        for row in (await get(f"{running.url}/sollol/status"))["workers"]:
            os.kill(row["pid"], signal.SIGKILL)
        asked = [get(f"{running.url}/api/version") for _ in range(20)]  # nobody is there
        assert len(await asyncio.gather(*asked)) == 20


async def test_a_reload_reaches_all_and_one_that_comes_later(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node, config = await ollama_node(), tmp_path / "sollol.yaml"
    config.write_text(json.dumps({"nodes": [node.host_port]}))
    async with proxy(tmp_path, "--config", str(config), "--workers", "2") as running:
        config.write_text(json.dumps({"nodes": [node.host_port], "guard": {"body_limit_bytes": 1}}))
        await running.said("changed: guard.body_limit_bytes")
        rows = (await get(f"{running.url}/sollol/status"))["workers"]
        os.kill(rows[0]["pid"], signal.SIGKILL)
        await running.said("ready: 1 of 1 nodes up", 3)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            for _ in range(12):
                assert (await ask(session, running.url, BY_NAME["chat"], PROMPT)).status == 413
        assert (await get(f"{running.url}/sollol/status"))["reload"]["result"] == "applied"


async def test_the_end_drains_all_and_leaves_nobody(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with (
        proxy(tmp_path, *arguments(node), "--workers", "2") as running,
        aiohttp.ClientSession() as session,
    ):
        workers = workers_of(running)
        node.hold_tokens()
        streaming = asyncio.create_task(ask(session, running.url, BY_NAME["generate"], PROMPT))
        await node.wait_received(1, path="/api/generate")
        running.process.send_signal(signal.SIGTERM)
        for pid in workers:  # as somebody who signals the whole group does: once is not twice
            os.kill(pid, signal.SIGTERM)
        node.go_on()
        assert (await streaming).ended
        assert await running.ended() == 0
        assert not any(psutil.pid_exists(pid) for pid in workers)


async def test_workers_drain_when_their_parent_is_gone(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    async with proxy(tmp_path, *arguments(node), "--workers", "2") as running:
        workers = [psutil.Process(pid) for pid in workers_of(running)]
        running.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, 30)
        assert not alive


@pytest.mark.parametrize("counts", [("1", "2"), ("2", "1"), ("3", "2")])
async def test_an_upgrade_to_another_number_of_workers_loses_nothing(
    ollama_node: NodeFactory, tmp_path: Path, counts: tuple[str, str]
) -> None:
    node = await ollama_node()
    before, after = counts
    async with (
        proxy(tmp_path, *arguments(node), "--workers", before) as old,
        under_load(old.url) as load,
        proxy(tmp_path, *arguments(node), "--workers", after) as new,
    ):
        assert new.url == old.url
        assert await old.ended() == 0
        await load.more(20)
        await load.stop()


def test_siblings_are_one_proxy_to_the_guard_and_several_to_the_agents() -> None:
    one, two = (Worker(number, 2, "f") for number in (1, 2))
    assert one.proxy_id != two.proxy_id
    headers: dict[str, str] = {}
    access.stamp(headers, one.proxy_id)
    assert access.loop(headers, two.proxy_id) is not None
    assert access.loop(headers, Worker(1, 2, "g").proxy_id) is None


def test_what_has_been_learned_has_a_place_for_each(tmp_path: Path) -> None:
    assert Worker().speeds(tmp_path) == Worker(1, 3).speeds(tmp_path) == tmp_path / "speeds.json"
    second = Worker(2, 3)
    assert second.known_speeds(tmp_path) == tmp_path / "speeds.json"  # for a start
    second.speeds(tmp_path).touch()
    assert second.known_speeds(tmp_path) == second.speeds(tmp_path) != tmp_path / "speeds.json"


def standing(name: str, position: int, waited_s: float) -> dict[str, Any]:
    return {"id": name, "position": position, "waited_s": waited_s}


def test_lines_of_workers_are_one_line() -> None:
    told = {
        1: {"queue": [standing("a", 1, 1.0), standing("b", 2, 1.0)]},
        2: {"queue": [standing("c", 1, 3.0)]},
    }
    merged = merge.queue(told)["queue"]
    assert [(row["id"], row["position"]) for row in merged] == [("c", 1), ("a", 2), ("b", 3)]


def test_means_are_weighted_by_what_they_are_means_of() -> None:
    row = {"name": "n", "failed": 0, "in_flight": 1, "in_flight_elsewhere": 3, "success_rate": 1.0}
    told = {
        1: {"nodes": [row | {"served": 3, "latency_s": 1.0}]},
        2: {"nodes": [row | {"served": 1, "latency_s": 5.0, "failed": 4}]},
    }
    (merged,) = merge.nodes(told)["nodes"]
    assert (merged["served"], merged["failed"], merged["success_rate"]) == (4, 4, 0.5)
    assert merged["latency_s"] == 2.0
    # Of the three that the first one sees elsewhere, one is the second worker's.
    assert (merged["in_flight"], merged["in_flight_elsewhere"]) == (2, 2)
