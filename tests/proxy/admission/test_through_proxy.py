"""Who waits, through the real proxy: what clients hear, and what nodes are sent and when."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from tests.fakes.faults import rst
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, WAYS, Heard, Way, ask
from tests.proxy.running import RunningProxy, with_slots
from tests.proxy.test_drain import proxy_process

CHAT, GENERATE = BY_NAME["chat"], BY_NAME["generate"]
SHAPES = [BY_NAME["chat"], BY_NAME["openai"], BY_NAME["anthropic"]]
PATHS = {way.path for way in WAYS}


class Fleet:
    """Nodes of one slot each unless told otherwise, the proxy over them, and a client."""

    def __init__(self, nodes: list[FakeOllama], proxy: RunningProxy, session: aiohttp.ClientSession) -> None:
        self.nodes, self.proxy, self.session = nodes, proxy, session
        self.tasks: list[asyncio.Task[Heard]] = []

    @property
    def node(self) -> FakeOllama:
        return self.nodes[0]

    def ask(
        self, name: str, way: Way = CHAT, headers: dict[str, str] | None = None, **extra: Any
    ) -> asyncio.Task[Heard]:
        """Ask under a name that the nodes see, and keep hearing in the background."""

        async def hear() -> Heard:
            async with aiohttp.ClientSession(headers=headers) as session:
                return await ask(session, self.proxy.url, way, prompt(name), **extra)

        self.tasks.append(task := asyncio.create_task(hear()))
        return task

    async def get(self, path: str) -> Any:
        async with self.session.get(self.proxy.url + path) as answer:
            return await answer.json()

    async def queued(self, count: int) -> list[dict[str, Any]]:
        """The queue, once so many wait."""
        async with asyncio.timeout(10):
            while len(rows := (await self.get("/sollol/queue"))["queue"]) != count:
                await asyncio.sleep(0.005)
        return list(rows)

    async def occupy(self, *names: str) -> None:
        """Fill all slots with answers that do not end before :meth:`go_on`."""
        for number, name in enumerate(names or ("first",), 1):
            for node in self.nodes:
                node.hold_tokens()
            self.ask(name)
            while sum(len(worked(node)) for node in self.nodes) < number:
                await asyncio.sleep(0.005)

    def go_on(self) -> None:
        for node in self.nodes:
            node.go_on()


def prompt(name: str, tokens: int = 3) -> str:
    return f"[[id:{name}]] [[n:{tokens}]]"


def worked(node: FakeOllama) -> list[str]:
    """The names of the requests that a node was sent, in order."""
    sent = [r.body.decode() for r in node.received if r.path in PATHS and r.method == "POST"]
    return [found[1] for body in sent if (found := re.search(r"\[\[id:([^\]]*)\]\]", body))]


@asynccontextmanager
async def fleet_of(count: int = 1, slots: int = 1, **settings: Any) -> AsyncIterator[Fleet]:
    nodes = [await FakeOllama(num_parallel=slots).start() for _ in range(count)]
    async with (
        RunningProxy([with_slots(node, slots) for node in nodes], **settings) as proxy,
        aiohttp.ClientSession() as session,
    ):
        fleet = Fleet(nodes, proxy, session)
        yield fleet
        fleet.go_on()
        await asyncio.gather(*fleet.tasks, return_exceptions=True)
    for node in nodes:
        node.heal()
        await node.stop()


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with fleet_of() as fleet:
        yield fleet


def complete(heard: Heard, name: str) -> None:
    assert (heard.status, heard.error, heard.broken) == (200, None, False)
    check_stream(heard.text, prompt(name))


async def test_the_more_urgent_overtake_whatever_they_speak(fleet: Fleet) -> None:
    await fleet.occupy()
    by: list[tuple[str, dict[str, Any]]] = [
        ("batch", {"priority": "batch"}),
        ("plain", {}),
        ("low", {"headers": {"x-sollol-priority": "low"}}),
        ("openai", {"way": BY_NAME["openai-whole"], "priority": 6}),
        ("anthropic", {"way": BY_NAME["anthropic"], "priority": "high"}),
        ("generate", {"way": GENERATE, "headers": {"x-sollol-priority": "9"}}),
        ("critical", {"priority": 10, "headers": {"x-sollol-priority": "1"}}),  # the body says more
    ]
    for number, (name, how) in enumerate(by, 1):
        fleet.ask(name, **how)
        await fleet.queued(number)
    fleet.go_on()
    for task, name in zip(fleet.tasks, ["first", *(name for name, _ in by)], strict=True):
        complete(await task, name)
    order = ["first", "critical", "generate", "anthropic", "openai", "plain", "low", "batch"]
    assert worked(fleet.node) == order


async def test_a_batch_request_is_served_while_critical_ones_keep_coming() -> None:
    async with fleet_of(admission={"ageing_s": 0.05}) as fleet:
        await fleet.occupy()
        batch = fleet.ask("batch", priority="batch")
        await fleet.queued(1)

        async def keep_asking(client: int) -> None:
            number = 0
            while not batch.done():
                number += 1
                await fleet.ask(f"c{client}-{number}", priority="critical")

        flood = [asyncio.create_task(keep_asking(client)) for client in range(8)]
        await fleet.queued(9)
        fleet.go_on()
        async with asyncio.timeout(60):
            complete(await batch, "batch")
        await asyncio.gather(*flood)
    assert worked(fleet.node)[1] != "batch"


CLASSES = [
    {"name": "many", "key": "key-of-many"},
    {"name": "one", "key": "key-of-one", "max_priority": "high", "weight": 3},
]


async def test_forty_requests_of_one_client_do_not_hold_up_the_one_of_another() -> None:
    async with fleet_of(clients=CLASSES) as fleet:
        await fleet.occupy()
        for number in range(40):
            fleet.ask(f"many{number}", headers={"authorization": "Bearer key-of-many"})
        await fleet.queued(40)
        fleet.ask("one", headers={"x-api-key": "key-of-one"})
        rows = await fleet.queued(41)
        assert [row["client"] for row in rows].index("one") <= 1
        fleet.go_on()
        await asyncio.gather(*fleet.tasks)
        assert worked(fleet.node).index("one") <= 2
        for request in fleet.node.received:
            assert request.header("authorization") is None
            assert request.header("x-api-key") is None


async def test_a_key_that_is_not_ours_goes_on_to_the_node() -> None:
    async with fleet_of(clients=CLASSES) as fleet:
        await fleet.ask("x", headers={"authorization": "Bearer another"})
        [request] = fleet.node.requests("/api/chat")
        assert request.header("authorization") == "Bearer another"


async def test_a_class_gives_a_priority_and_bounds_it() -> None:
    classes = [
        {"name": "nightly", "key": "k", "priority": "low", "max_priority": "normal"},
        {"name": "here", "networks": "127.0.0.0/8", "priority": "high"},
    ]
    async with fleet_of(clients=classes, admission={"max_priority": 6}) as fleet:
        await fleet.occupy()
        key = {"authorization": "Bearer k"}
        fleet.ask("a", headers=key)
        fleet.ask("b", headers=key, priority="critical")
        fleet.ask("c")
        fleet.ask("d", priority=2)
        rows = await fleet.queued(4)
        found = sorted((row["client"], row["priority"]) for row in rows)
        assert found == [("127.0.0.1", 2), ("127.0.0.1", 8), ("nightly", 3), ("nightly", 5)]


async def test_who_leaves_while_waiting_never_reaches_a_node(fleet: Fleet) -> None:
    await fleet.occupy()
    leaving = fleet.ask("gone")
    await fleet.queued(1)
    leaving.cancel()
    await fleet.queued(0)
    fleet.go_on()
    complete(await fleet.tasks[0], "first")
    complete(await fleet.ask("after"), "after")
    assert worked(fleet.node) == ["first", "after"]


async def test_a_request_is_given_the_node_that_comes_free() -> None:
    async with fleet_of(2) as fleet:
        await fleet.occupy("one", "two")
        waiting = fleet.ask("late")
        await fleet.queued(1)
        free = fleet.nodes[1]
        free.go_on()
        complete(await waiting, "late")
        assert worked(free)[-1] == "late"
        assert worked(fleet.nodes[0]) in (["one"], ["two"])


async def test_a_request_is_given_the_node_that_joins() -> None:
    async with fleet_of(2) as fleet:
        joining = fleet.nodes[1]
        await joining.kill()
        async with asyncio.timeout(10):
            while (await fleet.get("/sollol/status"))["status"] != "degraded":
                await asyncio.sleep(0.02)
        await fleet.occupy()
        waiting = fleet.ask("late")
        await fleet.queued(1)
        await joining.restart()
        complete(await waiting, "late")
        assert (worked(fleet.nodes[0]), worked(joining)) == (["first"], ["late"])


async def test_no_node_is_ever_sent_more_than_its_slots() -> None:
    async with fleet_of(2, slots=3) as fleet:
        for node in fleet.nodes:
            node.hold_tokens()
        for number in range(30):
            fleet.ask(f"r{number}")
        await fleet.queued(24)
        for node in fleet.nodes:
            await node.wait_until(lambda node=node: len(worked(node)) >= 3)  # type: ignore[misc]
        assert [len(worked(node)) for node in fleet.nodes] == [3, 3]
        fleet.go_on()
        for number, task in enumerate(fleet.tasks):
            complete(await task, f"r{number}")
        assert sorted(worked(fleet.nodes[0]) + worked(fleet.nodes[1])) == sorted(f"r{n}" for n in range(30))


async def test_what_waits_when_a_node_dies_is_served_by_the_others() -> None:
    async with fleet_of(2) as fleet:
        await fleet.occupy("one", "two")
        for number in range(6):
            fleet.ask(f"r{number}", BY_NAME["chat-whole"])
        await fleet.queued(6)
        await fleet.nodes[0].kill()
        fleet.nodes[1].go_on()
        heards = await asyncio.gather(*fleet.tasks)
        for heard in heards:
            assert (heard.status, heard.error) == (200, None)
        await fleet.nodes[0].restart()


async def test_a_request_whose_node_failed_goes_before_those_that_came_later(fleet: Fleet) -> None:
    fleet.node.fail(rst("before_head", path="/api/chat"))
    fleet.node.hold_tokens()
    first = fleet.ask("failed")
    complete_later = [fleet.ask(f"r{number}", GENERATE) for number in range(3)]
    async with asyncio.timeout(20):
        while len(worked(fleet.node)) < 2:
            await asyncio.sleep(0.005)
    fleet.go_on()
    complete(await first, "failed")
    for task in complete_later:
        assert (await task).status == 200
    assert worked(fleet.node)[0] == "failed"


def shape_of(heard: Heard, way: Way) -> str:
    """The sentence of an error, once its shape was found to be the protocol's own."""
    body = orjson.loads(heard.raw)
    if way.name == "anthropic":
        kind = {503: "overloaded_error", 429: "rate_limit_error", 400: "invalid_request_error"}[heard.status]
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        return str(body["error"]["message"])
    if way.name == "openai":
        kind = {503: "api_error", 429: "rate_limit_error", 400: "invalid_request_error"}[heard.status]
        assert body["error"]["type"] == kind
        return str(body["error"]["message"])
    return str(body["error"])


@pytest.mark.parametrize("way", SHAPES, ids=str)
async def test_a_full_queue_is_503_with_a_time_to_come_back(way: Way) -> None:
    async with fleet_of(admission={"max_queue": 1}) as fleet:
        await fleet.occupy()
        fleet.ask("waits")
        await fleet.queued(1)
        heard = await fleet.ask("beyond", way)
        assert heard.status == 503
        assert 1 <= int(heard.headers["retry-after"]) <= 60
        assert shape_of(heard, way) == "1 requests are waiting already (admission.max_queue); try again later"
        assert worked(fleet.node) == ["first"]
        async with fleet.session.get(f"{fleet.proxy.url}/metrics") as answer:
            assert 'sollol_admission_refused_total{reason="queue_full"} 1.0' in await answer.text()


@pytest.mark.parametrize("way", SHAPES, ids=str)
async def test_too_long_a_wait_is_503_and_says_how_long_it_was(way: Way) -> None:
    async with fleet_of(admission={"max_wait_s": 0.3}) as fleet:
        await fleet.occupy()
        heard = await fleet.ask("waits", way)
        assert heard.status == 503
        assert shape_of(heard, way) == "no node had time for this request within 0.3 s (admission.max_wait_s)"
        assert float(heard.headers["x-sollol-queue-wait"]) >= 0.3
        assert heard.headers["x-sollol-queue-position"] == "1"
        assert int(heard.headers["retry-after"]) >= 1
        await fleet.queued(0)


@pytest.mark.parametrize("way", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"max_in_flight": 1}, "app has 1 requests here, as many as it may have at once"),
        ({"rate_per_s": 0.01, "burst": 1}, "app may ask 0.01 times a second, 1 times at once"),
    ],
)
async def test_a_client_s_own_limit_is_429(way: Way, limit: dict[str, Any], sentence: str) -> None:
    async with fleet_of(clients=[{"name": "app", "key": "k"} | limit]) as fleet:
        key = {"authorization": "Bearer k"}
        await fleet.occupy("somebody else")
        mine = fleet.ask("mine", headers=key)
        await fleet.queued(1)
        heard = await fleet.ask("beyond", way, headers=key)
        assert heard.status == 429
        assert shape_of(heard, way) == sentence
        assert 1 <= int(heard.headers["retry-after"]) <= 60
        fleet.go_on()
        complete(await mine, "mine")
        if "max_in_flight" in limit:
            complete(await fleet.ask("again", headers=key), "again")


@pytest.mark.parametrize("way", SHAPES, ids=str)
@pytest.mark.parametrize("wrong", ["urgent", 0, 11, 5.5, True, [5]])
async def test_what_is_no_priority_is_400(fleet: Fleet, way: Way, wrong: Any) -> None:
    heard = await fleet.ask("x", way, priority=wrong)
    assert heard.status == 400
    wanted = "priority should be 1 to 10, or one of critical, high, normal, low, batch, not "
    assert shape_of(heard, way) == wanted + repr(wrong)
    assert worked(fleet.node) == []


async def test_the_header_is_read_as_strictly(fleet: Fleet) -> None:
    heard = await fleet.ask("x", headers={"x-sollol-priority": "very"})
    assert (heard.status, shape_of(heard, CHAT).partition(" ")[0]) == (400, "x-sollol-priority")


async def test_the_queue_is_seen_everywhere_and_prompts_nowhere(fleet: Fleet) -> None:
    await fleet.occupy()
    waiting = fleet.ask("secret", priority="high")
    [row] = await fleet.queued(1)
    assert (row["client"], row["model"], row["priority"], row["position"]) == (
        "127.0.0.1",
        "llama3.2:latest",
        8,
        1,
    )
    assert "secret" not in str(row)
    assert (await fleet.get("/sollol/status"))["queue_depth"] == 1
    assert (await fleet.get("/api/dashboard"))["queue_depth"] == 1
    async with fleet.session.get(f"{fleet.proxy.url}/metrics") as answer:
        text = await answer.text()
    assert 'sollol_queue_depth{priority="8"} 1.0' in text
    assert 'sollol_queue_depth{priority="5"} 0.0' in text
    fleet.go_on()
    heard, first = await waiting, await fleet.tasks[0]
    assert heard.headers["x-sollol-queue-position"] == "1"
    assert float(heard.headers["x-sollol-queue-wait"]) > 0
    assert float(heard.headers["x-sollol-queue-expected-wait"]) > 0
    assert "x-sollol-queue-wait" not in first.headers
    made = await fleet.get(f"/sollol/explain/{row['id']}")
    assert (made["queue_position"], made["priority"]) == (1, 8)
    assert made["queued_s"] > 0
    async with fleet.session.get(f"{fleet.proxy.url}/metrics") as answer:
        assert 'sollol_queue_wait_seconds_count{priority="8"} 1.0' in await answer.text()


async def test_what_is_no_inference_does_not_wait(fleet: Fleet) -> None:
    await fleet.occupy()
    async with fleet.session.get(f"{fleet.proxy.url}/api/tags") as answer:
        assert answer.status == 200
    async with fleet.session.post(f"{fleet.proxy.url}/api/show", json={"model": "llama3.2"}) as answer:
        assert answer.status == 200
    async with fleet.session.post(f"{fleet.proxy.url}/api/generate", json={"model": "llama3.2"}) as answer:
        assert (answer.status, (await answer.json())["done_reason"]) == (200, "load")
    assert await fleet.queued(0) == []


async def test_time_in_the_queue_is_not_time_to_the_first_byte() -> None:
    limits = {"first_byte_s": 0.4, "load_s": 0.1}
    async with fleet_of(timeouts=limits) as fleet:
        await fleet.occupy()
        fleet.node.scheduler.tokens_go_on.set()
        endless = fleet.ask("endless", GENERATE)
        await endless
        long = asyncio.create_task(
            ask(fleet.session, fleet.proxy.url, GENERATE, prompt("long", 400))  # at 50 tokens a second × 20
        )
        await fleet.node.wait_until(
            lambda: any(r.chunks > 2 and r.outcome == "open" for r in fleet.node.received)
        )
        waited = await fleet.ask("waited")
        complete(waited, "waited")
        assert (await long).ended
        assert waited.headers["x-sollol-attempts"] == "1"
        assert worked(fleet.node).count("waited") == 1


@pytest.mark.parametrize("way", SHAPES, ids=str)
async def test_at_the_limit_of_the_end_who_waits_is_told_so(way: Way, tmp_path: Any) -> None:
    node = await FakeOllama().start()
    limit = "timeouts.drain_s=0.5"
    async with proxy_process(node, tmp_path, limit) as (process, url), aiohttp.ClientSession() as session:
        node.hold_tokens()
        streaming = [asyncio.create_task(ask(session, url, GENERATE, prompt(name))) for name in ("a", "b")]
        await node.wait_received(2, path="/api/generate")  # one in a slot, and one to try for another
        waiting = asyncio.create_task(ask(session, url, way, prompt("waits")))
        async with asyncio.timeout(10):
            while True:
                async with session.get(f"{url}/sollol/queue") as answer:
                    if (await answer.json())["queue"]:
                        break
        process.send_signal(signal.SIGTERM)
        refused = await waiting
        assert refused.status == 503
        assert shape_of(refused, way) == "SOLLOL is shutting down"
        assert int(refused.headers["retry-after"]) >= 1
        for heard in await asyncio.gather(*streaming):
            assert heard.error and "SOLLOL is shutting down" in heard.error
        async with asyncio.timeout(20):
            assert await process.wait() == 0
    assert "waits" not in worked(node)
    await node.stop()


async def test_under_load_of_all_priorities_nothing_is_lost() -> None:
    async with fleet_of(3, slots=2, admission={"ageing_s": 0.1}) as fleet:
        for number in range(90):
            fleet.ask(f"r{number}", WAYS[number % 7], priority=1 + number % 10)
        for number, task in enumerate(fleet.tasks):
            complete(await task, f"r{number}")
        sent = [name for node in fleet.nodes for name in worked(node)]
        assert sorted(sent) == sorted(f"r{number}" for number in range(90))
