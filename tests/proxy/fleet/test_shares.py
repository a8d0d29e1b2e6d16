"""What other proxies have in flight: heard over real connections, and reckoned with as if it were ours."""

from __future__ import annotations

from typing import Any

import pytest

from agent.in_flight import News, Row
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.shares import Told, flight_of, hear, row_of
from proxy_addon.placement.policies import decide
from tests.fakes.fixtures import AgentFactory, NodeFactory
from tests.proxy.fleet.conftest import WatchFactory, until
from tests.proxy.placement.worlds import GIB, NOW_S, ask, name, node, report, resident
from tests.proxy.placement.worlds import row as models_row

CHAT = match("/api/chat")
assert CHAT is not None


def only(fleet: Fleet) -> Node:
    (found,) = fleet
    return found


def row(**more: Any) -> Row:
    return Row.model_validate(
        {"path": "/api/chat", "model": ask().key, "expected_s": 20.0, "service_s": 20.0} | more
    )


def heard(fleet: Fleet, number: int, **rows: Row | None) -> None:
    found = {f"other {id_}": row for id_, row in rows.items()}
    hear(fleet.nodes[name(number)], fleet, News(others=1, rows=found), NOW_S)


async def test_two_proxies_see_each_other_through_the_agent(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    one, two = (watched(fake, agent_url=agent.url, proxy_id=f"proxy-{n}") for n in (1, 2))
    here, there = only(one.fleet), only(two.fleet)
    asked = Ask(CHAT, key="m:latest", stream=True)
    await until(lambda: here.on_flight and there.on_flight)
    flights = [here.take(asked, 0.0, 7.0), here.take(asked, 0.0, 7.0)]
    await until(lambda: len(there.foreign) == 2)
    assert there.in_use["m:latest"] == 2 and there.own_flights == 0 and not here.foreign
    assert {flight.expected_s for flight in there.flights} == {7.0}
    flights[0].answered(1.0)
    await until(lambda: any(flight.first_byte_s is not None for flight in there.flights))
    flights[0].drop()
    await until(lambda: len(there.flights) == 1)
    freed: list[bool] = []
    two.fleet.on_freed.append(lambda: freed.append(True))
    await one.watch.stop()  # its share goes with it, and whoever waits there hears of it
    await until(lambda: freed)
    assert not there.flights and not there.in_use and there.work_s == 0.0


async def test_what_is_known_of_others_ends_with_the_agent(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    port = int(agent.host_port.rpartition(":")[2])
    one, two = (watched(fake, agent_url=agent.url, proxy_id=f"proxy-{n}") for n in (1, 2))
    here, there = only(one.fleet), only(two.fleet)
    await until(lambda: here.on_flight and there.on_flight)
    here.take(Ask(CHAT, key="m:latest"), 0.0, 7.0)
    await until(lambda: there.foreign)
    await agent.stop()
    await until(lambda: not there.foreign)
    assert len(here.flights) == 1  # our own are ours whoever hears of them
    await agent.start(port)
    await until(lambda: there.foreign)  # told again once it is back


async def test_an_agent_that_may_not_share_is_named_once(
    ollama_node: NodeFactory,
    fake_agent: AgentFactory,
    watched: WatchFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("agent.server.is_loopback", lambda request: False)
    monkeypatch.setattr("proxy_addon.fleet.shares.REFUSED_PAUSE_S", 0.0)
    fake = await ollama_node()
    agent = await fake_agent(fake)
    found = watched(fake, agent_url=agent.url)
    await until(lambda: "does not share" in caplog.text)
    first_s = only(found.fleet).report_s
    await until(lambda: only(found.fleet).report_s != first_s)  # it is watched all the same
    assert caplog.text.count("set the same agent_token here and there") == 1


async def test_a_node_under_two_names_is_seen_as_one(
    ollama_node: NodeFactory, fake_agent: AgentFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    agent = await fake_agent(fake)
    found = watched(fake, agent_url=agent.url)
    first = only(found.fleet)
    second = found.fleet.add(Node("localhost", fake.server.port, agent_url=agent.url))
    await until(lambda: first.on_flight and second.on_flight)
    flight = first.take(Ask(CHAT, key="m:latest"), 0.0, 7.0)
    await until(lambda: second.foreign)
    flight.drop()
    await until(lambda: not second.flights)


def test_a_slot_that_another_proxy_has_is_taken() -> None:
    fleet = Fleet()
    for number in (1, 2):
        node(fleet, number, resident={"m": resident()})
    before = decide(ask(), fleet, Speeds(), NOW_S)
    heard(fleet, 1 if before.node == name(1) else 2, a=row())
    after = decide(ask(), fleet, Speeds(), NOW_S)
    assert after.node != before.node
    busy = next(c for c in after.candidates if c.node == before.node)
    assert busy.terms["wait_s"] == pytest.approx(20.0)


def test_a_load_that_another_proxy_has_begun_is_shared() -> None:
    fleet = Fleet()
    for number in (1, 2):
        node(fleet, number, parallel=2)
    heard(fleet, 2, a=row(loads=True, expected_s=2.0, service_s=1.0))
    decision = decide(ask(), fleet, Speeds(), NOW_S)
    assert decision.node == name(2) and "shares a load under way" in decision.chosen.notes  # type: ignore[union-attr]


def test_memory_that_a_load_of_another_proxy_will_take_is_gone() -> None:
    fleet = Fleet()
    node(fleet, 1, report=report(8), models={"m": models_row(), "other": models_row()})
    (before,) = decide(ask(), fleet, Speeds(), NOW_S).rows
    heard(fleet, 1, a=row(model="other", loads=True, need_bytes=5 * GIB))
    (after,) = decide(ask(), fleet, Speeds(), NOW_S).rows
    assert (before.gpu_share, before.evicts) == (1.0, ())
    assert after.evicts == ("other",)  # it is in the way as soon as it is there


def test_a_runner_that_another_proxy_had_loaded_has_its_options() -> None:
    fleet = Fleet()
    node(fleet, 1, resident={"m": resident()})
    heard(fleet, 1, a=row(loads=True, options={"num_ctx": 8192}))
    heard(fleet, 1, a=None)
    assert fleet.nodes[name(1)].loaded_with[ask().key] == (("num_ctx", 8192),)


def test_a_row_says_all_that_a_decision_reads_of_a_flight() -> None:
    fleet = Fleet()
    here = node(fleet, 1)
    asked = ask(reload_key=(("num_ctx", 8192),), num_ctx=8192, max_tokens=50, stream=True)
    flight = here.take(asked, NOW_S - 3, 9.0, True, 4.0, None, ("old:latest",), 7)
    flight.answered(NOW_S - 1)
    copy = flight_of(here, Row.model_validate(row_of(flight, NOW_S).model_dump()), NOW_S)
    assert copy is not None and copy.foreign
    for field in ("started_s", "expected_s", "first_byte_s", "load", "service_s", "evicts", "need_bytes"):
        assert getattr(copy, field) == pytest.approx(getattr(flight, field)), field
    for field in ("key", "reload_key", "num_ctx", "max_tokens", "stream", "kind", "task"):
        assert getattr(copy.ask, field) == getattr(asked, field), field
    assert flight_of(here, row(path="/api/of-a-later-version"), NOW_S) is None


def test_a_line_is_told_to_nodes_that_have_its_model() -> None:
    fleet = Fleet()
    here, other = node(fleet, 1), node(fleet, 2, models={"other": models_row()})
    told, apart = Told(here, fleet), Told(other, fleet)
    fleet.waits({"m": 7})
    (row,) = told.patch(0.0).values()
    assert row is not None and (row.model, row.waits) == ("m", 7)
    assert apart.patch(0.0) == {} == told.patch(0.0)
    heard(fleet, 1, **{"line m": row})
    assert fleet.waits_elsewhere("m") == 7 and fleet.waits_elsewhere("other") is None
    assert not here.flights
    fleet.waits({})
    assert list(told.patch(0.0).values()) == [None]
    heard(fleet, 1, **{"line m": None})
    assert fleet.waits_elsewhere("m") is None


def test_only_what_has_changed_is_told() -> None:
    here = Node("10.0.0.1", 11434)
    asked = Ask(CHAT, key="m:latest")
    before = here.take(asked, 0.0, 1.0)
    told = Told(here, Fleet())
    here.on_flight = told.changed
    assert next(iter(told.patch(0.0).values())) is not None
    assert told.patch(0.0) == {}
    here.take(asked, 0.0, 1.0).drop()  # it came and went
    before.answered(2.0)
    (row,) = told.patch(3.0).values()
    assert row is not None and row.answering_s == 1.0
    before.drop()
    assert list(told.patch(3.0).values()) == [None]
