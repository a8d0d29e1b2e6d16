"""Coordinators behind the real proxy: diversion, the loss of one, and how all of it is seen."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from mitmproxy import http
from rich.console import Console

from agent.ollama import names
from agent.report import NodeKind
from proxy_addon import plans, record
from proxy_addon.ask import Ask
from proxy_addon.commands import explain, status
from proxy_addon.endpoints import ENDPOINTS
from proxy_addon.fleet.node import Node
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.settings import Timeouts
from proxy_addon.timeouts import first_byte_limit_s
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.faults import reply
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import GIB, FakeModel
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, Heard, ask
from tests.proxy.fleet.conftest import until
from tests.proxy.running import RunningProxy

BIG = FakeModel("big", size=40 * GIB)
SMALL = FakeModel("small", size=1 * GIB)
PROMPT = "[[id:job]] [[n:12]] count"
CHAT = BY_NAME["chat"]


class House:
    """One small Ollama with an agent, coordinators, the proxy over them, a client."""

    def __init__(
        self,
        node: FakeOllama,
        coordinators: list[FakeCoordinator],
        proxy: RunningProxy,
        session: aiohttp.ClientSession,
    ) -> None:
        self.node, self.coordinators, self.proxy, self.session = node, coordinators, proxy, session
        self.flows: list[http.HTTPFlow] = []
        proxy.master.addons.add(self)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """As the last addon, see every request."""
        self.flows.append(flow)

    async def ask(self, model: str = "big", **extra: Any) -> Heard:
        return await ask(self.session, self.proxy.url, CHAT, PROMPT, **{"model": model, **extra})

    async def json(self, path: str) -> Any:
        async with self.session.get(self.proxy.url + path) as answer:
            return orjson.loads(await answer.read())

    def seen(self) -> Any:
        """The first coordinator as the proxy knows it."""
        return self.proxy.sollol.fleet.nodes[self.coordinators[0].host_port]

    def under_way(self) -> list[record.Record]:
        """The requests that have not ended."""
        records = (record.of(flow) for flow in self.flows)
        return [rec for rec in records if rec is not None and rec.ask is not None and rec.ended_s is None]

    async def reported(self) -> None:
        """The proxy knows the report of everybody."""
        await until(lambda: all(node.report is not None for node in self.proxy.sollol.fleet))


@asynccontextmanager
async def house(coordinators: int = 1, **settings: Any) -> AsyncIterator[House]:
    node = await FakeOllama([BIG, SMALL], vram_bytes=4 * GIB, ram_bytes=8 * GIB).start()
    agent = await FakeAgent(node).start()
    sharded = [await FakeCoordinator([BIG, SMALL]).start() for _ in range(coordinators)]
    nodes = [
        {"host": "127.0.0.1", "port": node.server.port, "agent": agent.url},
        *(f"shard://{each.host_port}" for each in sharded),
    ]
    async with RunningProxy(nodes, **settings) as proxy, aiohttp.ClientSession() as session:
        found = House(node, sharded, proxy, session)
        await found.reported()
        yield found
    for each in (node, *sharded):
        await each.stop()
    await agent.stop()


def whole(heard: Heard) -> None:
    assert (heard.status, heard.error, heard.ended) == (200, None, True)
    check_stream(heard.text, PROMPT)


async def test_only_what_no_node_holds_is_diverted() -> None:
    async with house() as found:
        small, big = await found.ask("small"), await found.ask("big")
        whole(small)
        whole(big)
        assert small.headers["x-sollol-node"] == found.node.host_port
        assert big.headers["x-sollol-node"] == found.coordinators[0].host_port


async def test_a_coordinator_refuses_what_all_its_nodes_cannot_hold() -> None:
    async with house() as found:
        found.coordinators[0].models["big:latest"] = {"fits": False, "why": "12.0 GiB too big"}
        await until(lambda: not all(model.fits for model in found.seen().report.shard.models))
        heard = await found.ask()
        assert heard.status == 503
        assert "does not fit its nodes: 12.0 GiB too big" in str(heard.error)
        assert found.coordinators[0].requests("/api/chat") == []


TEXTS = [
    "llama-server process has terminated: exit status 1: 3 plans failed",
    "model requires more system memory (99.0 GiB) than is available (60.0 GiB): big is 39.0 GiB too big",
    "the link to b cannot be measured: connection refused",
]


@pytest.mark.parametrize("text", TEXTS)
async def test_what_one_coordinator_cannot_do_another_one_may(text: str) -> None:
    async with house(2) as found:
        failing, other = found.coordinators
        failing.fail(reply(500, text, path="/api/chat"))
        found.proxy.sollol.fleet.nodes[other.host_port].turn = 10**9  # it is the failing one's turn
        heard = await found.ask()
        whole(heard)
        assert heard.headers["x-sollol-attempts"] == "2"
        assert heard.headers["x-sollol-node"] == other.host_port


async def test_the_coordinators_own_words_are_the_answer_where_there_is_no_other() -> None:
    async with house(shard={"wait_s": 0}) as found:
        found.coordinators[0].fail(reply(500, TEXTS[1], path="/api/chat"))
        async with found.session.post(
            found.proxy.url + CHAT.path, json={**CHAT.body(PROMPT), "model": "big"}
        ) as answer:
            assert (answer.status, await answer.json()) == (500, {"error": TEXTS[1]})
        whole(await found.ask())  # its report still says that the model fits


async def test_a_killed_coordinator_is_replaced_by_another_one() -> None:
    async with house(2) as found:
        for each in found.coordinators:
            each.hold_loads()
        asking = asyncio.create_task(found.ask())
        await until(lambda: any(each.scheduler.loading for each in found.coordinators))
        loading = next(each for each in found.coordinators if each.scheduler.loading)
        other = next(each for each in found.coordinators if each is not loading)
        other.go_on()
        await loading.kill()
        heard = await asking
        whole(heard)
        assert heard.headers["x-sollol-node"] == other.host_port


async def test_a_killed_coordinator_is_waited_for_and_the_client_sees_a_delay_only() -> None:
    async with house(retry={"rounds": 2}) as found:
        coordinator = found.coordinators[0]
        coordinator.hold_loads()
        asking = asyncio.create_task(found.ask())
        await until(lambda: coordinator.scheduler.loading)
        (rec,) = found.under_way()
        await coordinator.kill()
        await until(lambda: rec.rounds > 4)  # far more than an ordinary request would go through
        assert found.seen().poll_error is not None and not asking.done()
        await coordinator.restart()
        heard = await asking
        whole(heard)
        assert heard.headers["x-sollol-node"] == coordinator.host_port


async def test_the_wait_for_a_coordinator_ends() -> None:
    async with house(shard={"wait_s": 0.3}) as found:
        await found.coordinators[0].kill()
        heard = await found.ask()
        assert heard.status == 503
        assert f"{found.coordinators[0].host_port}: is down" in str(heard.error)


async def test_nobody_waits_once_the_client_has_left() -> None:
    async with house() as found:
        await found.coordinators[0].kill()
        asking = asyncio.create_task(found.ask())
        await until(lambda: any(rec.awaits_until_s is not None for rec in found.under_way()))
        asking.cancel()
        await until(lambda: found.under_way() == [])
        (made,) = (await found.json("/sollol/decisions"))["requests"]
        assert made["outcome"] == "client_left"


async def test_what_was_measured_at_the_coordinator_sends_the_next_request_to_a_node() -> None:
    model = FakeModel("medium", size=3 * GIB)
    async with house() as found:
        for each in (found.node, *found.coordinators):
            each.store.add(model)
        found.coordinators[0].used_bytes["medium:latest"] = 6 * GIB
        sollol, key, options = found.proxy.sollol, names.canonical("medium"), {"num_ctx": 131_072}
        await until(lambda: all(key in node.models for node in sollol.fleet))
        await until(lambda: model.digest in sollol.fleet.shapes)
        first = await found.ask("medium", options=options)
        assert first.headers["x-sollol-node"] == found.coordinators[0].host_port
        await until(lambda: sollol.speeds.sizes(key))
        second = await found.ask("medium", options=options)
        whole(second)
        made = await found.json("/sollol/explain/" + second.headers["x-sollol-request-id"])
        assert made["decisions"][0]["node"] == found.node.host_port
        # The node cannot hold it after all: the client does not notice, and the next one is not tried there.
        assert [attempt["outcome"] for attempt in made["attempts"]] == ["too_small", "ok"]
        third = await found.ask("medium", options=options)
        assert third.headers["x-sollol-attempts"] == "1"
        assert third.headers["x-sollol-node"] == found.coordinators[0].host_port


async def test_a_load_is_seen_while_it_goes_on() -> None:
    async with house() as found:
        coordinator = found.coordinators[0]
        coordinator.hold_loads()
        asking = asyncio.create_task(found.ask())
        await until(lambda: coordinator.scheduler.loading)
        node = found.proxy.sollol.fleet.nodes[coordinator.host_port]
        await until(lambda: node.report.shard.loads)
        shown = _printed(status.render(await found.json("/sollol/status")))
        assert (
            f"{coordinator.host_port}: big:latest loading [#####...............] 25%, 42.0 s left;"
            " layers 0-13 on a CUDA0, 14-27 and output on b CUDA0" in shown
        )
        async with found.session.get(found.proxy.url + "/metrics") as answer:
            metrics = await answer.text()
        host = coordinator.host_port
        assert f'sollol_shard_load_progress{{host="{host}",model="big:latest"}} 0.25' in metrics
        labels = f'device="CUDA0",host="{host}",kind="expected",model="big:latest",node="a"'
        assert dict(_samples(metrics, "sollol_shard_device_bytes"))[labels] == 20 * GIB
        assert f'sollol_shard_plans_total{{host="{host}"}} 1.0' in metrics
        coordinator.go_on()
        whole(await asking)
        ready = next(row for row in (await found.json("/sollol/nodes"))["nodes"] if row["name"] == host)
        assert {row["model"]: row["fits"] for row in ready["shard"]["models"]} == {
            "big:latest": True,
            "small:latest": True,
        }


async def test_a_diverted_request_is_explained_with_its_plan_which_is_journalled_once() -> None:
    async with house() as found:
        coordinator = found.coordinators[0]
        heard = await found.ask()
        node = found.proxy.sollol.fleet.nodes[coordinator.host_port]
        await until(lambda: node.report.shard.plans)
        await until(lambda: node.resident)
        heard = await found.ask()
        made = await found.json("/sollol/explain/" + heard.headers["x-sollol-request-id"])
        plan_id = f"plan-{coordinator.server.port}-1"
        assert (made["shard_plan"], made["plan"]["id"]) == (plan_id, plan_id)
        console = Console(width=250, file=io.StringIO())
        explain.show(made, console)
        shown = console.file.getvalue()
        assert "; no other node holds the model" in shown
        assert "may not serve: does not fit: needs " in shown
        assert f"plan {plan_id} of 2026-01-01T00:00:00Z: a request; num_ctx 4096 × 1" in shown
        assert "14-27 and output" in shown
        journal = found.proxy.sollol.journal
        assert list(journal.plans) == [plan_id]
        journal.file.flush()
        path = journal.file.path
        await until(lambda: path.exists() and plan_id in path.read_text())
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        assert [line["coordinator"] for line in lines if "coordinator" in line] == [coordinator.host_port]
        again = type(journal)(path.parent)
        assert list(again.plans) == [plan_id]  # after a restart it is known, and not noted again


def _samples(metrics: str, name: str) -> Iterator[tuple[str, float]]:
    for line in metrics.splitlines():
        if line.startswith(name + "{"):
            labels, _, value = line.removeprefix(name + "{").rpartition("} ")
            yield labels, float(value)


def _printed(what: Any) -> str:
    console = Console(width=250, file=io.StringIO())
    console.print(what)
    return str(console.file.getvalue())


async def test_a_plan_that_the_answer_names_is_that_one() -> None:
    async with house() as found:
        assert plans.of_answer({"x-sollol-shard-plan": "p-7"}, found.seen(), "any") == "p-7"
        plain = found.proxy.sollol.fleet.nodes[found.node.host_port]
        assert plans.of_answer({"x-sollol-shard-plan": "p-7"}, plain, "any") is None


def test_a_coordinators_first_byte_may_take_a_load_and_a_long_one_takes_its_time() -> None:
    def limit_s(kind: NodeKind, load_s: float) -> float:
        node = Node("10.0.0.9", 11436, kind=kind)
        asked = Ask(ENDPOINTS[0], "big", "big", stream=True)
        rec = record.Record("id", "native", 0.0, "", ask=asked, node=node)
        rec.flight = node.take(asked, 0.0, 1.0, load=load_s > 0)
        chosen = Candidate(node.name, None, 1.0, {"load_s": load_s})
        rec.decisions = [Decision("finish_time", node.name, (chosen,), "")]
        return first_byte_limit_s(Timeouts(first_byte_s=120, load_s=600), rec)

    assert limit_s("ollama", 0) == 120
    assert limit_s("ollama", 10) == 720
    assert limit_s("shard", 0) == 720  # a backend may be lost, and all of it loaded anew
    assert limit_s("shard", 1000) == 3120


async def test_the_fleet_is_still_one_server() -> None:
    async with house() as found:
        coordinator = found.coordinators[0]
        whole(await found.ask("big"))
        whole(await found.ask("small"))
        rows = (await found.json("/api/ps"))["models"]
        assert sorted(row["name"] for row in rows) == ["big:latest", "small:latest"]
        listed = [row["name"] for row in (await found.json("/api/tags"))["models"]]
        assert sorted(listed) == ["big:latest", "small:latest"]
        url = found.proxy.url
        async with found.session.post(f"{url}/api/show", json={"model": "big"}) as answer:
            assert answer.headers["x-sollol-node"] == found.node.host_port
        await found.session.post(f"{url}/api/generate", json={"model": "big", "keep_alive": 0})
        await coordinator.wait_until(lambda: not coordinator.scheduler.runners)
        copy = {"source": "small", "destination": "copy"}
        async with found.session.post(f"{url}/api/copy", json=copy) as answer:
            assert answer.status == 200
        create = {"model": "mine", "from": "small", "stream": False}
        async with found.session.post(f"{url}/api/create", json=create) as answer:
            assert answer.status == 200
        async with found.session.post(f"{url}/api/pull", json={"model": "big", "stream": False}):
            pass
        coordinator.store.models.pop("registry.ollama.ai/library/small:latest", None)
        async with found.session.delete(f"{url}/api/delete", json={"model": "small"}) as answer:
            assert answer.status == 200
        listed = [row["name"] for row in (await found.json("/api/tags"))["models"]]
        assert "small:latest" not in listed  # the coordinator was asked anew as well
        for path in ("/api/copy", "/api/create", "/api/pull", "/api/delete"):
            assert coordinator.requests(path) == []
