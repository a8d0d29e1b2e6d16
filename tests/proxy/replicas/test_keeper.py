"""Replicas and pins through the real proxy: what nodes are sent, and what is said of it."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from rich.console import Console

from proxy_addon.commands.status import render
from proxy_addon.fleet.node import Node
from tests.fakes.fixtures import AgentFactory, NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.scheduler import FOREVER_S
from tests.fakes.store import GIB, FakeModel, embedding_model
from tests.proxy.running import RunningProxy

#: So big that placement would rather let a second request wait than load it elsewhere.
BIG = FakeModel("llama3.2", size=20 * GIB)
MACHINE: dict[str, Any] = {
    "vram_bytes": 32 * GIB,
    "load_bytes_s": 200 * GIB,
    "default_num_ctx": 4096,
    "unload_s": 0.01,
}
QUICK = {"pressure_s": 0.5, "sustain_s": 0.2, "idle_s": 300, "cooldown_s": 0.1}
LIMIT_S = 10.0
KEY = "registry.ollama.ai/library/llama3.2:latest"


async def chat(session: aiohttp.ClientSession, proxy: RunningProxy, **more: Any) -> dict[str, Any]:
    """The last object of an answer of a few tokens."""
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "[[n:4]] hi"}], "stream": False}
    async with session.post(f"{proxy.url}/api/chat", json=body | more) as answer:
        assert answer.status == 200, await answer.text()
        return orjson.loads(await answer.read())  # type: ignore[no-any-return]


async def status(session: aiohttp.ClientSession, proxy: RunningProxy) -> dict[str, Any]:
    async with session.get(f"{proxy.url}/sollol/status") as answer:
        return await answer.json()  # type: ignore[no-any-return]


def shown(told: dict[str, Any]) -> str:
    """What `sollol status` prints."""
    page = Console(width=200, file=io.StringIO())
    page.print(render(told))
    return page.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def ours(node: FakeOllama) -> list[dict[str, Any]]:
    """The bodies of the requests that the proxy itself has sent to change what is in memory."""
    bodies = [orjson.loads(record.body) for record in node.requests("/api/generate")]
    return [body for body in bodies if not body.get("prompt")]


def notes(proxy: RunningProxy) -> list[dict[str, Any]]:
    """What the journal says that was done, the oldest first."""
    return [note["data"] for note in reversed(proxy.sollol.journal.noted("replica", 1000))]


async def noted(proxy: RunningProxy, node: FakeOllama, count: int) -> list[dict[str, Any]]:
    """The notes once there are ``count``."""
    await node.wait_until(lambda: len(notes(proxy)) >= count, LIMIT_S)
    return notes(proxy)


async def polled(node: FakeOllama, times: int = 4) -> None:
    """Until the proxy has looked at ``node`` so often again: it has had its chance to act."""
    await node.wait_received(len(node.requests("/api/ps")) + times, "/api/ps", LIMIT_S)


def session_s(node: FakeOllama) -> list[float]:
    """How long what is in memory there stays after its last use."""
    return [runner.session_s for runner in node.scheduler.runners.values()]


async def kept(node: FakeOllama) -> None:
    """Until the one model there is to stay for ever."""
    await node.wait_until(lambda: [s >= FOREVER_S for s in session_s(node)] == [True], LIMIT_S)


async def steady(proxy: RunningProxy, node: FakeOllama) -> None:
    """Until the proxy takes what it has loaded to stay: it looks again only if something happens."""
    pins = proxy.sollol.keeper.pins
    await node.wait_until(lambda: bool(notes(proxy)) and not any(p.loads for p in pins.values()), LIMIT_S)


# replicas


async def queue_up(
    session: aiohttp.ClientSession,
    proxy: RunningProxy,
    nodes: list[FakeOllama],
    holding_loads: bool = False,
) -> tuple[FakeOllama, FakeOllama, list[asyncio.Task[dict[str, Any]]]]:
    """The node that has the model, the other one, and two requests of which one waits for the other."""
    await chat(session, proxy)
    hot, cold = sorted(nodes, key=lambda node: not node.scheduler.runners)
    assert not cold.scheduler.loads
    await polled(hot)
    if holding_loads:
        cold.hold_loads()
    hot.hold_tokens()
    asked = [asyncio.create_task(chat(session, proxy)) for _ in range(2)]
    await hot.wait_received(2, "/api/chat")  # that of before, and one of these
    return hot, cold, asked


async def test_a_hot_model_gets_its_second_runner_before_more_requests_wait(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with (
        RunningProxy(nodes, replicas="auto", replication=QUICK) as proxy,
        aiohttp.ClientSession() as session,
    ):
        hot, cold, asked = await queue_up(session, proxy, nodes)
        await cold.wait_until(lambda: bool(cold.scheduler.runners), LIMIT_S)
        [load] = ours(cold)
        assert load == {"model": "llama3.2:latest", "keep_alive": "600s", "options": {}, "stream": False}
        [note] = await noted(proxy, cold, 1)
        assert (note["action"], note["node"], note["outcome"]) == ("load", cold.host_port, "ok")
        assert note["model"] == "llama3.2:latest" and " for one of 1 slots" in note["reason"]
        assert (await chat(session, proxy))["done"]  # the next one need not wait for the two
        assert len(cold.requests("/api/chat")) >= 1 and hot.scheduler.runners
        assert (await status(session, proxy))["replicas"] == [
            {"model": "llama3.2:latest", "node": cold.host_port}
        ]
        async with session.get(f"{proxy.url}/metrics") as answer:
            assert 'sollol_replica_actions_total{action="load"} 1.0' in await answer.text()
        hot.go_on()
        await asyncio.gather(*asked)


async def test_who_waits_in_the_proxys_own_line_counts(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with (
        RunningProxy(nodes, replicas="auto", replication=QUICK) as proxy,
        aiohttp.ClientSession() as session,
    ):
        await chat(session, proxy)
        hot, cold = sorted(nodes, key=lambda node: not node.scheduler.runners)
        await polled(hot)
        waiting = SimpleNamespace(waiter=SimpleNamespace(ask=SimpleNamespace(key=KEY)), waited_s=99.0)
        monkeypatch.setattr(proxy.sollol.dispatch.admission, "standings", lambda: [waiting])
        proxy.sollol.keeper.stir()
        await cold.wait_until(lambda: bool(cold.scheduler.runners), LIMIT_S)
        assert "a request waits 99.0 s" in (await noted(proxy, cold, 1))[0]["reason"]


async def test_nothing_is_loaded_where_replicas_are_off(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with RunningProxy(nodes, replication=QUICK) as proxy, aiohttp.ClientSession() as session:
        hot, cold, asked = await queue_up(session, proxy, nodes)
        await polled(cold, 8)
        assert not cold.scheduler.loads and not ours(hot) and not notes(proxy)
        hot.go_on()
        await asyncio.gather(*asked)


async def test_a_replica_is_loaded_under_the_options_that_are_asked_for(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with (
        RunningProxy(nodes, replicas="auto", replication=QUICK) as proxy,
        aiohttp.ClientSession() as session,
    ):
        wide = {"options": {"num_ctx": 8192}}
        await chat(session, proxy, **wide)
        hot, cold = sorted(nodes, key=lambda node: not node.scheduler.runners)
        await polled(hot)
        hot.hold_tokens()
        asked = [asyncio.create_task(chat(session, proxy, **wide)) for _ in range(2)]
        await cold.wait_until(lambda: bool(cold.scheduler.runners), LIMIT_S)
        await noted(proxy, cold, 1)
        await chat(session, proxy, **wide)
        assert cold.scheduler.loads == ["llama3.2:latest"]  # not loaded anew for the request
        hot.go_on()
        await asyncio.gather(*asked)


async def test_a_replica_that_nobody_uses_is_given_up_and_the_first_runner_stays(
    ollama_node: NodeFactory,
) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with (
        RunningProxy(nodes, replicas="auto", replication=QUICK | {"idle_s": 1.0}) as proxy,
        aiohttp.ClientSession() as session,
    ):
        hot, cold, asked = await queue_up(session, proxy, nodes)
        await cold.wait_until(lambda: bool(cold.scheduler.runners), LIMIT_S)
        hot.go_on()
        await asyncio.gather(*asked)
        await cold.wait_until(lambda: bool(cold.scheduler.unloads), LIMIT_S)
        assert [note["action"] for note in await noted(proxy, cold, 2)] == ["load", "unload"]
        assert notes(proxy)[1]["reason"].startswith("nobody has used this replica for")
        await polled(hot, 8)
        assert hot.scheduler.runners and not ours(hot) and len(ours(cold)) == 2


async def test_placement_sees_a_load_of_ours_under_way(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([BIG], **MACHINE) for _ in range(2)]
    async with (
        RunningProxy(nodes, replicas="auto", replication=QUICK) as proxy,
        aiohttp.ClientSession() as session,
    ):
        hot, cold, asked = await queue_up(session, proxy, nodes, holding_loads=True)
        await cold.wait_until(lambda: cold.scheduler.loading is not None, LIMIT_S)
        [flight] = proxy.sollol.fleet.nodes[cold.host_port].flights
        assert flight.load and flight.ask.load_only
        cold.go_on()
        await noted(proxy, cold, 1)
        assert not proxy.sollol.fleet.nodes[cold.host_port].flights
        hot.go_on()
        await asyncio.gather(*asked)


# pins


async def test_a_pinned_model_is_loaded_at_the_start_for_good(ollama_node: NodeFactory) -> None:
    node = await ollama_node(["llama3.2", "other"])
    async with RunningProxy([node], pin=["llama3.2"]) as proxy, aiohttp.ClientSession() as session:
        await kept(node)
        assert [body["keep_alive"] for body in ours(node)] == [-1]
        [note] = await noted(proxy, node, 1)
        assert note["reason"] == "it is pinned and not in memory"
        assert proxy.sollol.fleet.nodes[node.host_port].pinned == {KEY}
        await polled(node, 8)
        assert len(ours(node)) == 1  # nothing more is needed
        told = await status(session, proxy)
        assert told["pins"] == [
            {"model": "llama3.2:latest", "node": node.host_port, "state": "kept", "why": ""}
        ]


async def test_a_pinned_model_is_back_after_its_node_has_restarted(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    async with RunningProxy([node], pin=["llama3.2"]) as proxy:
        await kept(node)
        await noted(proxy, node, 1)
        await steady(proxy, node)
        await node.kill()
        await node.restart()
        await kept(node)
        assert [note["reason"] for note in await noted(proxy, node, 2)] == [
            "it is pinned and not in memory"
        ] * 2


@pytest.mark.parametrize("keep_alive", [0, "20ms"])
async def test_a_pinned_model_is_back_after_a_clients_keep_alive(
    ollama_node: NodeFactory, keep_alive: object
) -> None:
    node = await ollama_node()
    async with RunningProxy([node], pin=["llama3.2"]) as proxy, aiohttp.ClientSession() as session:
        await kept(node)
        await steady(proxy, node)
        await chat(session, proxy, keep_alive=keep_alive)
        await node.wait_until(lambda: len(node.scheduler.loads) == 2, LIMIT_S)
        await kept(node)
        assert (await noted(proxy, node, 2))[1]["action"] == "load"


async def test_a_clients_longer_keep_alive_is_overruled_without_a_load(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    async with RunningProxy([node], pin=["llama3.2"]) as proxy, aiohttp.ClientSession() as session:
        await kept(node)
        # Under options of its own: the client's are kept, or each would load the model anew for the other.
        await chat(session, proxy, keep_alive="5m", options={"num_ctx": 2048})
        assert session_s(node) == [300]
        await kept(node)
        assert [note["action"] for note in await noted(proxy, node, 2)] == ["load", "keep"]
        assert ours(node)[1]["options"] == {"num_ctx": 2048}
        assert len(node.scheduler.loads) == 2  # ours and the client's


async def test_a_pin_goes_to_the_node_that_it_names(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(), await ollama_node()
    async with RunningProxy([a, b], pin=[f"llama3.2@{b.host_port}"]):
        await kept(b)
        await polled(a)
        assert not a.scheduler.loads


async def test_a_pin_for_any_node_stays_where_it_is_and_moves_when_that_is_lost(
    ollama_node: NodeFactory,
) -> None:
    nodes = [await ollama_node(), await ollama_node()]
    async with RunningProxy(nodes, pin=["llama3.2"]) as proxy, aiohttp.ClientSession() as session:
        for node in nodes:
            await polled(node)
        home, other = sorted(nodes, key=lambda node: not node.scheduler.runners)
        await kept(home)
        await home.refuse()
        home.black_hole()
        home.freeze()
        await kept(other)
        home.heal()
        await home.accept_again()
        await home.wait_until(lambda: bool(home.scheduler.unloads), LIMIT_S)  # not held twice
        assert [note["action"] for note in await noted(proxy, other, 3)] == ["load", "load", "unload"]
        assert notes(proxy)[2]["reason"] == f"its pin has moved to {other.host_port}"
        assert [row["node"] for row in (await status(session, proxy))["pins"]] == [other.host_port]


async def test_a_pin_is_met_by_a_node_that_joins(
    ollama_node: NodeFactory, caplog: pytest.LogCaptureFixture
) -> None:
    a, late = await ollama_node(["other"]), await ollama_node()
    caplog.set_level(logging.INFO, "proxy_addon.replicas.keeper")
    async with RunningProxy([a], pin=["llama3.2"]) as proxy, aiohttp.ClientSession() as session:
        await polled(a)
        why = "llama3.2:latest cannot be pinned: no node has it"
        told = await status(session, proxy)
        assert told["pins"] == [{"model": "llama3.2:latest", "node": None, "state": "missing", "why": why}]
        assert shown(told).splitlines()[-1].strip() == f"{why}."
        proxy.sollol.fleet.add(Node(late.server.host, late.server.port))
        await kept(late)
        await noted(proxy, late, 1)
        assert [row["why"] for row in (await status(session, proxy))["pins"]] == [""]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"{why}."]


async def test_a_pin_that_does_not_fit_beside_another_is_not_forced(
    ollama_node: NodeFactory, fake_agent: AgentFactory
) -> None:
    node = await ollama_node([BIG, FakeModel("qwen3", size=20 * GIB)], **MACHINE)
    where = {
        "host": node.server.host,
        "port": node.server.port,
        "agent": (await fake_agent(node)).url,
    }
    async with RunningProxy([where], pin=["llama3.2", "qwen3"]) as proxy, aiohttp.ClientSession() as session:
        await kept(node)

        def told(sentence: str) -> Callable[[], bool]:
            return lambda: any(sentence in pin["why"] for pin in proxy.sollol.fleet.pins)

        await node.wait_until(told("would give up llama3.2:latest, which is pinned there"), LIMIT_S)
        await polled(node, 8)
        assert node.scheduler.loads == ["llama3.2:latest"]
        assert [pin["state"] for pin in (await status(session, proxy))["pins"]] == ["kept", "missing"]


async def test_a_pin_that_fails_is_tried_again_and_told(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.scheduler.load_errors.append("llama runner process has terminated: exit status 2")
    async with RunningProxy([node], pin=["llama3.2"]) as proxy:
        await kept(node)
        first, second = await noted(proxy, node, 2)
        assert first["outcome"] == "failed: llama runner process has terminated: exit status 2"
        assert second["outcome"] == "ok"


async def test_a_load_on_a_node_that_is_lost_holds_nothing_up(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node(), await ollama_node()]
    for node in nodes:
        node.hold_loads()
    async with RunningProxy(nodes, pin=["llama3.2"]) as proxy:
        await asyncio.gather(*(polled(node) for node in nodes))
        first, other = sorted(nodes, key=lambda node: node.scheduler.loading is None)
        assert first.scheduler.loading is not None
        first.freeze()  # the load neither ends nor fails
        other.go_on()
        await kept(other)
        assert [note["node"] for note in await noted(proxy, other, 2)] == [first.host_port, other.host_port]
        assert notes(proxy)[0]["outcome"].startswith(f"cut short: {first.host_port} is lost: it ")
        first.heal()
        first.go_on()


async def test_an_embedding_model_can_be_pinned(ollama_node: NodeFactory) -> None:
    node = await ollama_node([embedding_model()])
    async with RunningProxy([node], pin=["nomic-embed-text"]) as proxy:
        await kept(node)
        assert [note["outcome"] for note in await noted(proxy, node, 1)] == ["ok"]


async def test_a_load_under_way_ends_with_the_proxy_and_is_journalled(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.hold_loads()
    async with RunningProxy([node], pin=["llama3.2"]) as proxy:
        await node.wait_until(lambda: node.scheduler.loading is not None, LIMIT_S)
    assert [note["outcome"] for note in notes(proxy)] == ["cut short: SOLLOL ends"]
