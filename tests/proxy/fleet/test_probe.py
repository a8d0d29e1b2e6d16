"""Nodes in doubt are tried by the proxy itself: when, with what, and that nobody is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping
from itertools import pairwise
from typing import Any

import aiohttp
import orjson
import pytest

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.probe import FIRST_S, LONGEST_S, TOKENS, Prober, Schedule
from proxy_addon.fleet.watch import Watch
from proxy_addon.record import FinalStats
from proxy_addon.settings import Settings
from tests.fakes.faults import reply
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.proxy.placement.worlds import NOW_S, ask, node, resident

FAST, SLOW = 100.0, 10.0


def observe(speeds: Speeds, n: Node, key: str, tok_s: float, times: int = 1, now_s: float = NOW_S) -> None:
    for _ in range(times):
        stats = FinalStats(200, 100, 0.0, 0.2, 100 / tok_s)
        speeds.observe(n, ask(key), stats, 0.2, 0.2 + 100 / tok_s, 1, now_s)


def doubtful(key: str = "m", **fields: Any) -> tuple[Fleet, Node, Speeds]:
    """A node whose model has become ten times slower."""
    fleet, speeds = Fleet(), Speeds()
    fields = {"resident": {key: resident()}, "loaded_with": {key: ()}} | fields
    n = node(fleet, 1, **fields)
    observe(speeds, n, key, FAST, 5)
    observe(speeds, n, key, SLOW, 3)
    return fleet, n, speeds


def want(speeds: Speeds, now_s: float, key: str = "m") -> None:
    for _ in range(50):
        speeds.demand.note(ask(key), now_s)


def test_a_slow_node_is_tried_first_after_a_pause_and_then_more_and_more_rarely() -> None:
    fleet, n, speeds = doubtful()
    schedule, tried_s = Schedule(), []
    for second in range(1200):
        now_s = NOW_S + second
        want(speeds, now_s)
        for found, key, doubt in schedule.due(fleet, speeds, now_s):
            assert (found, key, doubt) == (n, "m", "slow")
            tried_s.append(second)
            schedule.tried(n.name, now_s, hopeful=False)
    gaps = [later - earlier for earlier, later in pairwise(tried_s)]
    assert tried_s[0] == FIRST_S
    assert gaps[:5] == [30, 60, 120, 240, LONGEST_S]


def test_a_node_that_did_better_is_tried_again_at_once() -> None:
    fleet, n, speeds = doubtful()
    schedule = Schedule()
    want(speeds, NOW_S + 100)
    assert not schedule.due(fleet, speeds, NOW_S)
    schedule.tried(n.name, NOW_S + 15, hopeful=False)
    assert not schedule.due(fleet, speeds, NOW_S + 16)
    schedule.tried(n.name, NOW_S + 16, hopeful=True)
    assert schedule.due(fleet, speeds, NOW_S + 16)


def _busy(n: Node, speeds: Speeds) -> None:
    n.take(ask(), NOW_S, 1.0)


def _busy_elsewhere(n: Node, speeds: Speeds) -> None:
    assert n.report is not None
    n.report.ollama.requests_in_flight = 1


def _down(n: Node, speeds: Speeds) -> None:
    n.poll_error = "it refused the connection"


def _ejected(n: Node, speeds: Speeds) -> None:
    n.health.ejected_until_s = NOW_S + 1000


def _not_in_memory(n: Node, speeds: Speeds) -> None:
    n.resident = {}


def _loaded_by_somebody_else(n: Node, speeds: Speeds) -> None:
    n.loaded_with.clear()


def _unwanted(n: Node, speeds: Speeds) -> None:
    speeds.demand._models.clear()


def _recovered(n: Node, speeds: Speeds) -> None:
    observe(speeds, n, "m", FAST, 2)


@pytest.mark.parametrize(
    "change",
    [
        _busy,
        _busy_elsewhere,
        _down,
        _ejected,
        _not_in_memory,
        _loaded_by_somebody_else,
        _unwanted,
        _recovered,
    ],
)
def test_it_is_let_alone(change: Callable[[Node, Speeds], None]) -> None:
    fleet, n, speeds = doubtful()
    schedule = Schedule()
    schedule.due(fleet, speeds, NOW_S)
    want(speeds, NOW_S)
    now_s = NOW_S + FIRST_S
    assert schedule.due(fleet, speeds, now_s)
    change(n, speeds)
    assert not schedule.due(fleet, speeds, now_s)


def test_a_node_without_doubt_is_forgotten() -> None:
    fleet, n, speeds = doubtful()
    schedule = Schedule()
    schedule.due(fleet, speeds, NOW_S)
    assert n.name in schedule.pauses
    observe(speeds, n, "m", FAST, 2)
    schedule.due(fleet, speeds, NOW_S)
    assert not schedule.pauses


class World:
    """A watched fleet of real fake nodes, and a prober whose clock runs as told."""

    def __init__(self, fakes: list[FakeOllama], session: aiohttp.ClientSession) -> None:
        self.fleet, self.speeds = Fleet(), Speeds()
        for fake in fakes:
            self.fleet.add(Node("127.0.0.1", fake.server.port))
        settings = Settings.model_validate({"discovery": {"agents": False}, "poll": {"interval_s": 0.05}})
        self.watch = Watch(self.fleet, settings, lambda: session)
        self.notes: list[dict[str, Any]] = []
        self.ahead_s = 0.0
        self.prober = Prober(
            self.fleet,
            self.speeds,
            lambda: session,
            lambda: asyncio.get_running_loop().time() + self.ahead_s,
            self._stamp,
            lambda kind, data: self.notes.append(data),
        )
        self.now = self.prober._now

    @staticmethod
    def _stamp(headers: MutableMapping[str, str]) -> None:
        headers["x-stamp"] = "ours"

    async def doubt(self, fake: FakeOllama, session: aiohttp.ClientSession) -> Node:
        """Let the fake's model be loaded, wanted, and believed slow."""
        body = {"model": "llama3.2", "prompt": "hi", "options": {"num_ctx": 2048, "num_predict": 4}}
        async with session.post(fake.url + "/api/generate", json=body) as answer:
            await answer.read()
        n = next(node for node in self.fleet if node.port == fake.server.port)
        self.watch.follow()
        await self.watch.looked()
        await self.watch.refresh([n])
        await self.watch.refresh_resident([n])
        (key,) = n.models
        n.loaded_with[key] = (("num_ctx", 2048),)
        observe(self.speeds, n, key, FAST, 5, self.now())
        observe(self.speeds, n, key, SLOW, 3, self.now())
        want(self.speeds, self.now(), key)
        await self.prober.look()
        self.ahead_s += FIRST_S
        return n


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


def generated(fake: FakeOllama) -> list[dict[str, Any]]:
    return [orjson.loads(r.body) for r in fake.requests("/api/generate")[1:]]


async def test_an_idle_suspect_is_asked_for_a_few_tokens_and_found_recovered(
    ollama_node: NodeFactory, session: aiohttp.ClientSession
) -> None:
    fake = await ollama_node(decode_tok_s=FAST, time_scale=0.05)
    world = World([fake], session)
    try:
        n = await world.doubt(fake, session)
        await world.prober.look()
        await world.prober.look()
        asked = generated(fake)
        assert [body["options"] for body in asked] == [
            {"num_ctx": 2048, "num_predict": TOKENS, "temperature": 0}
        ] * 2
        assert len(fake.scheduler.loads) == 1, "nothing was loaded for it"
        assert world.speeds.doubt(n.name, world.now()) is None
        assert [note["outcome"] for note in world.notes] == ["better", "better"]
        assert ("x-stamp", "ours") in fake.requests("/api/generate")[-1].headers
        world.ahead_s += 3600
        want(world.speeds, world.now(), next(iter(n.models)))
        await world.prober.look()
        assert len(generated(fake)) == 2, "who is no longer in doubt is let alone"
        assert not n.flights
    finally:
        await world.watch.stop()


async def test_a_suspect_at_work_is_not_asked(
    ollama_node: NodeFactory, session: aiohttp.ClientSession
) -> None:
    fake = await ollama_node(decode_tok_s=FAST, time_scale=0.05)
    world = World([fake], session)
    try:
        n = await world.doubt(fake, session)
        flight = n.take(ask(next(iter(n.models))), world.now(), 1.0)
        await world.prober.look()
        assert generated(fake) == []
        flight.drop()
        await world.prober.look()
        assert len(generated(fake)) == 1
    finally:
        await world.watch.stop()


async def test_a_try_that_fails_counts_against_the_node_and_the_next_is_later(
    ollama_node: NodeFactory, session: aiohttp.ClientSession
) -> None:
    fake = await ollama_node(decode_tok_s=FAST, time_scale=0.05)
    world = World([fake], session)
    try:
        n = await world.doubt(fake, session)
        before = world.speeds.success_rate(n.name, world.now())
        fake.fail(reply(500, "the runner has stopped", path="/api/generate"))
        await world.prober.look()
        assert world.prober.outcomes == {"failed": 1}
        assert world.speeds.success_rate(n.name, world.now()) < before
        assert n.health.failures == 1
        world.ahead_s += FIRST_S
        await world.prober.look()
        assert len(generated(fake)) == 1
    finally:
        await world.watch.stop()


async def test_the_end_gives_up_a_try_under_way(
    ollama_node: NodeFactory, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy_addon.fleet.probe.LOOK_EVERY_S", 0.01)
    fake = await ollama_node(decode_tok_s=FAST, time_scale=0.05)
    world = World([fake], session)
    try:
        n = await world.doubt(fake, session)
        fake.hold_tokens()
        world.prober.start()
        await fake.wait_received(2, path="/api/generate")
        assert len(n.flights) == 1, "placement sees what the node is busy with"
        await world.prober.stop()
        assert not n.flights
        assert not n.in_use
        await world.prober.stop()
    finally:
        fake.go_on()
        await world.watch.stop()
