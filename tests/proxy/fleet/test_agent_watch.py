"""What an agent adds to its node, and that nothing it does or fails to do can take the node away."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from yarl import URL

from agent.report import SCHEMA_VERSION
from proxy_addon.ask import Ask
from proxy_addon.endpoints import ENDPOINTS
from proxy_addon.fleet import agent_watch
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.polls import PollFailed, ReportTooNew, parse_report
from tests.fakes.coordinator import FakeCoordinator
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.faults import hang
from tests.fakes.fixtures import AgentFactory, NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.proxy.fleet.conftest import WatchFactory, until


def only(fleet: Fleet) -> Node:
    (node,) = fleet
    return node


def up(node: Node) -> bool:
    return node.up(asyncio.get_running_loop().time())


async def test_a_report_arrives_without_rows_of_models(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    found = watched(fake, agent_url=agent.url)
    node = only(found.fleet)
    await until(lambda: node.report)
    assert node.report is not None
    assert node.report.node_id == agent.node_id
    assert node.report.gpus[0].memory_total_bytes == fake.spec.vram_bytes
    assert node.report.ollama.models == []
    assert node.report_s is not None
    first_s = node.report_s
    await until(lambda: node.report_s != first_s)


async def test_the_agent_is_told_what_is_in_flight(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    found = watched(fake, agent_url=agent.url)
    node = only(found.fleet)
    await until(lambda: node.report and node.report.ollama.requests_in_flight == 0)
    flights = [node.take(Ask(ENDPOINTS[0]), 0, 1) for _ in range(3)]
    await until(lambda: node.report and node.report.ollama.requests_in_flight == 3)
    for flight in flights:
        flight.drop()
    await until(lambda: node.report and node.report.ollama.requests_in_flight == 0)


async def test_an_agent_that_goes_leaves_the_node_up_and_may_come_back(
    ollama_node: NodeFactory, watched: WatchFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, agent_watch.__name__)
    fake = await ollama_node()
    agent = await FakeAgent(fake).start()
    found = watched(fake, agent_url=agent.url)
    node = only(found.fleet)
    await until(lambda: node.report)
    await agent.stop()
    await until(lambda: node.report is None)
    assert up(node)
    again = await FakeAgent(fake).start(port=URL(agent.url).port or 0)
    await until(lambda: node.report)
    await again.stop()
    await until(lambda: node.report is None)
    assert found.lost == []
    there = f"{node.name} has an agent at {agent.url}, version "
    gone = f"The agent at {agent.url} "
    said = [record.getMessage() for record in caplog.records if record.name == agent_watch.__name__]
    assert [line.startswith(start) for line, start in zip(said, [there, gone, there, gone], strict=True)] == [
        True
    ] * 4


async def test_an_agent_that_hangs_leaves_the_node_up(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake, silent = await ollama_node(), await ollama_node()
    silent.fail(hang(path="/v1/report", times=None))
    found = watched(fake, agent_url=silent.url, poll={"timeout_s": 60})
    await found.watch.looked()
    await fake.wait_received(len(fake.requests("/api/ps")) + 10, "/api/ps")
    assert up(only(found.fleet))
    assert len(silent.received) == 1, "a poll waits for the one before"


async def test_a_later_schema_is_refused_with_a_clear_sentence_once(
    ollama_node: NodeFactory,
    fake_agent: AgentFactory,
    watched: WatchFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    agent.changes = {"schema_version": SCHEMA_VERSION + 1}
    found = watched(fake, agent_url=agent.url)
    await until(lambda: agent.served > 4)
    node = only(found.fleet)
    assert node.report is None
    assert up(node)
    later = SCHEMA_VERSION + 1
    assert [r.getMessage() for r in caplog.records] == [
        f"The agent at {agent.url} speaks report schema {later}, but this proxy reads no later one than"
        f" {SCHEMA_VERSION}: update SOLLOL on the proxy's machine; {node.name} is watched without it."
    ]


@pytest.mark.parametrize("token", ["secret", "wrong"])
async def test_the_token_is_shown_to_the_agent(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory, token: str
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake, token="secret")
    found = watched(fake, agent_url=agent.url, agent_token=token)
    node = only(found.fleet)
    if token == "secret":
        await until(lambda: node.report)
    else:
        await fake.wait_received(8, "/api/ps")
        assert node.report is None


async def test_the_token_is_not_shown_to_whoever_announces_himself(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    stranger = await ollama_node()
    found = watched(agent_token="secret")
    found.fleet.add(Node("127.0.0.1", fake.server.port, agent_url=stranger.url, source="mdns"))
    (asked, *_) = await stranger.wait_received(1, "/v1/report")
    assert asked.header("authorization") is None


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> Any:
    def at(agent: FakeAgent | FakeOllama) -> None:
        monkeypatch.setattr(agent_watch, "AGENT_PORT", URL(agent.url).port)
        monkeypatch.setattr(agent_watch, "GUESS_EVERY_S", 0.0)

    return at


async def test_an_agent_that_nobody_named_is_found(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory, guess: Any
) -> None:
    fake, other = await ollama_node(), await ollama_node()
    agent = await fake_agent(fake)
    guess(agent)
    found = watched(fake, other, discovery={"agents": True})
    node, neighbour = found.fleet
    await until(lambda: node.report)
    assert node.agent_url == agent.url
    await other.wait_received(len(other.requests("/api/ps")) + 3, "/api/ps")
    assert neighbour.report is None, "the agent reports on another Ollama of that machine"
    assert neighbour.agent_url is None


async def test_a_guess_is_quiet_and_can_be_switched_off(
    ollama_node: NodeFactory, watched: WatchFactory, guess: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake, no_agent = await ollama_node(), await ollama_node()
    guess(no_agent)
    found = watched(fake, discovery={"agents": True})
    await no_agent.wait_received(3, "/v1/report")
    await found.watch.stop()
    assert caplog.records == []
    no_agent.forget()
    watched(fake, discovery={"agents": False})
    await fake.wait_received(len(fake.requests("/api/ps")) + 3, "/api/ps")
    assert no_agent.received == []


@pytest.mark.parametrize("guesses", [True, False])
async def test_a_coordinator_reports_for_itself(watched: WatchFactory, guesses: bool) -> None:
    async with FakeCoordinator(["big"]) as coordinator:
        found = watched(discovery={"agents": guesses})
        node = found.fleet.add(Node("127.0.0.1", coordinator.server.port, kind="shard"))
        assert node.coordinator
        await until(lambda: node.report and node.report.shard)
        await coordinator.kill()
        await until(lambda: node.report is None)
        await coordinator.restart()
        await until(lambda: node.report)  # within a second, not when it is guessed at again
        await found.watch.stop()


async def test_a_single_machine_behind_llama_server_is_no_coordinator(
    fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    async with FakeCoordinator(["small"]) as single:
        single.reports = False
        agent = await fake_agent(single)
        agent.changes = {"kind": "shard"}
        found = watched(single, agent_url=agent.url)
        node = only(found.fleet)
        node.kind = "shard"
        await until(lambda: node.report)
        assert not node.coordinator
        await found.watch.stop()


async def test_what_is_no_report_is_refused(ollama_node: NodeFactory) -> None:
    good = FakeAgent(await ollama_node()).report().model_dump(mode="json")

    def refusal(**changes: object) -> str:
        with pytest.raises(PollFailed) as caught:
            parse_report(orjson.dumps(good | changes))
        return caught.value.reason

    assert parse_report(orjson.dumps(good | {"unknown": 1})).node_id == good["node_id"]
    assert refusal(schema_version="x") == "sent something that is no report"
    assert refusal(host={}).startswith("sent a report that is broken at host.hostname: ")
    assert refusal(ollama=7).startswith("sent a report that is broken at ollama: ")
    with pytest.raises(PollFailed, match="no report"):
        parse_report(b"<html>")
    with pytest.raises(ReportTooNew):  # known by its number alone, whatever else it holds
        parse_report(orjson.dumps({"schema_version": 99, "ollama": None}))
