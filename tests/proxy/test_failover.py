"""Every fault at every moment, in every protocol: what the client must see, on the real proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from tests.fakes.faults import (
    TEXTS,
    Fault,
    error_line,
    fin,
    garbage,
    hang,
    named,
    no_done,
    reply,
    rst,
    trickle,
)
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, WAYS, Heard, Way, ask
from tests.proxy.running import RunningProxy, with_slots

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = "[[id:job]] [[n:12]] count"
LLAMA = "registry.ollama.ai/library/llama3.2:latest"
LIMITS = {"connect_s": 0.5, "first_byte_s": 0.7, "load_s": 0.3, "idle_s": 0.5, "whole_answer_s": 0.7}


class Fleet:
    """Two nodes with one model, the proxy over them, a client."""

    def __init__(self, nodes: list[FakeOllama], proxy: RunningProxy, session: aiohttp.ClientSession) -> None:
        self.nodes, self.proxy, self.session = nodes, proxy, session

    async def ask(self, way: Way, prompt: str = PROMPT, **extra: object) -> Heard:
        return await ask(self.session, self.proxy.url, way, prompt, **extra)

    def fail_once(self, fault: Fault) -> None:
        """The next request hits ``fault``, on whichever node it is sent to; only that one."""
        for node in self.nodes:
            node.fail(fault)

    def fail_all(self, make: Callable[[], Fault]) -> None:
        for node in self.nodes:
            node.fail(make())

    def node(self, name: str) -> FakeOllama:
        return next(node for node in self.nodes if node.host_port == name)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    nodes = [await FakeOllama().start() for _ in range(2)]
    # Round robin: of two requests one goes to either node, so that a dead one is really tried.
    async with (
        RunningProxy(nodes, timeouts=LIMITS, placement="round_robin") as proxy,
        aiohttp.ClientSession() as session,
    ):
        yield Fleet(nodes, proxy, session)
    for node in nodes:
        node.heal()
        await node.stop()


def complete(heard: Heard, way: Way, prompt: str = PROMPT) -> None:
    """The client saw a whole, proper answer and nothing else."""
    assert (heard.status, heard.error, heard.broken) == (200, None, False)
    assert heard.ended
    if way.name != "embed":
        check_stream(heard.text, prompt)


BEFORE_THE_FIRST_BYTE = {
    "rst at accept": lambda path: rst("accept"),
    "rst before the head": lambda path: rst("before_head", path=path),
    "fin before the head": lambda path: fin("before_head", path=path),
    "garbage instead of the head": lambda path: garbage("before_head", path=path),
    "half a head": lambda path: fin("mid_head", path=path),
    "half a head, reset": lambda path: rst("mid_head", path=path),
    "head, then rst": lambda path: rst("after_head", path=path),
    "head, then fin": lambda path: fin("after_head", path=path),
    "head, then garbage": lambda path: garbage("after_head", path=path),
    "half of the first line, then rst": lambda path: rst("mid_line", path=path),
    "half of the first line, then fin": lambda path: fin("mid_line", path=path),
    "silence before the head": lambda path: hang("before_head", path=path),
    "silence after the head": lambda path: hang("after_head", path=path),
    "503 busy": lambda path: named("busy", path=path),
    "500 out of memory": lambda path: named("oom_cuda", path=path),
    "404 stale inventory": lambda path: reply(404, "model 'llama3.2' not found", path=path),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("moment", BEFORE_THE_FIRST_BYTE)
async def test_no_client_sees_a_node_fail_before_its_first_byte(fleet: Fleet, way: Way, moment: str) -> None:
    fault = BEFORE_THE_FIRST_BYTE[moment](way.path)
    if fault.at == "accept":  # only the request's own connection, not a poll's
        fault = rst("before_head", path=way.path)
    fleet.fail_once(fault)
    heard = await fleet.ask(way)
    complete(heard, way)
    assert fault.hits == 1
    assert heard.headers["x-sollol-attempts"] == "2"
    assert sum(len(node.requests(way.path)) for node in fleet.nodes) == 2


@pytest.mark.parametrize("text", TEXTS)
async def test_every_retryable_text_of_ollama_is_answered_by_another_node(fleet: Fleet, text: str) -> None:
    way = BY_NAME["embed" if text.startswith("embed") else "chat"]
    fault = named(text, path=way.path)
    fleet.fail_once(fault)
    complete(await fleet.ask(way), way)
    assert fault.hits == 1


NEVER_RETRIED = [
    (400, "invalid model name"),
    (400, '"llama3.2" does not support tools'),
    (401, "unauthorized"),
    (500, "template: :1: unexpected EOF in template"),
]


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai"], BY_NAME["anthropic"]], ids=str)
@pytest.mark.parametrize(("status", "text"), NEVER_RETRIED)
async def test_an_error_that_is_the_clients_own_is_shown_once_and_unchanged(
    fleet: Fleet, way: Way, status: int, text: str
) -> None:
    if "unexpected EOF" in text:
        text = "template: :1: function not defined"
    fleet.fail_once(reply(status, text, path=way.path))
    async with fleet.session.post(fleet.proxy.url + way.path, json=way.body(PROMPT)) as answer:
        assert answer.status == status
        assert text in (await answer.text()).replace('\\"', '"')
    assert sum(len(node.requests(way.path)) for node in fleet.nodes) == 1


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai-whole"], BY_NAME["embed"]], ids=str)
@pytest.mark.parametrize("fault", ["refuse", "black_hole", "freeze", "kill", "slow_accept"])
async def test_no_client_sees_a_whole_node_die(fleet: Fleet, way: Way, fault: str) -> None:
    node = fleet.nodes[0]
    for _ in range(2):
        complete(await fleet.ask(way), way)  # both nodes have a kept connection
    if fault == "slow_accept":
        node.slow_accept(30)
    elif asyncio.iscoroutinefunction(action := getattr(node, fault)):
        await action()
    else:
        action()
    async with aiohttp.ClientSession() as fresh:  # a client connection without kept upstream connections
        for session in (fresh, fleet.session, fresh, fleet.session):  # and one with them
            complete(await ask(session, fleet.proxy.url, way, PROMPT), way)
    served = len(fleet.nodes[1].requests(way.path))
    # Of these the last two break kept connections too; through the others the node may go on to answer.
    assert served == 5 if fault in ("freeze", "kill") else 3 <= served <= 5


async def test_a_node_killed_while_it_works_loses_nothing_that_had_not_begun(fleet: Fleet) -> None:
    for each in fleet.nodes:
        each.fail(hang("before_head", path="/api/chat"))
    waiting = asyncio.create_task(fleet.ask(BY_NAME["chat"]))
    async with asyncio.timeout(10):
        while not any(node.requests("/api/chat") for node in fleet.nodes):
            await asyncio.sleep(0.005)
    node, other = sorted(fleet.nodes, key=lambda node: -len(node.requests("/api/chat")))
    other.heal()
    await node.kill()
    complete(await waiting, BY_NAME["chat"])


async def test_a_node_that_dies_with_a_hundred_requests_loses_none_of_them() -> None:
    nodes = [await FakeOllama(num_parallel=8).start() for _ in range(2)]
    nodes[0].hold_tokens()
    way = BY_NAME["chat-whole"]
    prompts = [f"[[id:r{i}]] [[n:3]]" for i in range(200)]
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        RunningProxy([with_slots(node, 100) for node in nodes], placement="round_robin") as proxy,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        asking = asyncio.gather(*(ask(session, proxy.url, way, prompt) for prompt in prompts))
        await nodes[0].wait_received(100, path=way.path, timeout_s=30)
        await nodes[0].kill()
        heards = await asking
    for heard, prompt in zip(heards, prompts, strict=True):
        complete(heard, way, prompt)
    await nodes[1].stop()


async def test_a_busy_node_that_answers_no_polls_keeps_what_flows_and_what_has_nowhere_to_go() -> None:
    node = await FakeOllama().start()
    prompt = "[[id:slow]] [[n:2500]]"
    async with RunningProxy([with_slots(node, 2)]) as proxy, aiohttp.ClientSession() as session:
        streaming = asyncio.create_task(ask(session, proxy.url, BY_NAME["generate"], prompt))
        await node.wait_received(1, path="/api/generate")
        waiting = asyncio.create_task(ask(session, proxy.url, BY_NAME["chat-whole"], PROMPT))  # for the slot
        await node.wait_received(1, path="/api/chat")
        for path in ("/api/ps", "/api/version", "/api/tags"):
            node.fail(hang("before_head", path=path, times=None))
        async with asyncio.timeout(30):
            while proxy.sollol.fleet.nodes[node.host_port].poll_error is None:
                await asyncio.sleep(0.01)
        assert not streaming.done() and not waiting.done()
        complete(await streaming, BY_NAME["generate"], prompt)
        complete(await waiting, BY_NAME["chat-whole"])
    node.heal()
    await node.stop()


async def test_a_hung_node_is_noticed_by_its_polls_long_before_the_first_byte_limit() -> None:
    nodes = [await FakeOllama().start() for _ in range(2)]
    limits = {"first_byte_s": 300, "whole_answer_s": 300}
    async with RunningProxy(nodes, timeouts=limits) as proxy, aiohttp.ClientSession() as session:
        fleet, way = Fleet(nodes, proxy, session), BY_NAME["chat-whole"]
        frozen = fleet.node((await fleet.ask(way)).headers["x-sollol-node"])
        frozen.freeze()
        async with asyncio.timeout(20):
            for _ in range(2):
                complete(await fleet.ask(way), way)
    for each in nodes:
        each.heal()
        await each.stop()


MID_STREAM = {
    "rst": lambda path: rst("after_chunks", chunks=3, path=path),
    "fin": lambda path: fin("after_chunks", chunks=3, path=path),
    "garbage": lambda path: garbage("after_chunks", chunks=3, path=path),
    "silence": lambda path: hang("after_chunks", chunks=3, path=path),
    "rst in mid-line": lambda path: rst("mid_line", chunks=3, path=path),
    "fin in mid-line": lambda path: fin("mid_line", chunks=3, path=path),
    "a clean end without the final object": lambda path: no_done(path=path),
    "an error line": lambda path: error_line(chunks=3, path=path),
}


@pytest.mark.parametrize("way", [way for way in WAYS if way.stream], ids=str)
@pytest.mark.parametrize("moment", MID_STREAM)
async def test_a_stream_that_breaks_off_ends_in_its_own_protocol_with_an_explicit_error(
    fleet: Fleet, way: Way, moment: str
) -> None:
    fleet.fail_once(MID_STREAM[moment](way.path))
    heard = await fleet.ask(way)
    assert heard.status == 200
    assert not heard.broken, "the body must end well-framed"
    if moment == "garbage" and heard.ended:  # it came with the first bytes, of which the client had seen none
        complete(heard, way)
        return
    assert heard.error, "the client must be told"
    assert not heard.ended
    got = check_stream(heard.text, PROMPT, complete=False)
    assert 1 <= got <= 12
    assert sum(len(node.requests(way.path)) for node in fleet.nodes) == 1, "never repeated after a byte"
    complete(await fleet.ask(way), way)  # the same client connection goes on


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai"], BY_NAME["chat-whole"]], ids=str)
@pytest.mark.parametrize("action", ["rst", "fin"])
async def test_a_connection_that_ends_at_any_byte_leaves_a_whole_answer_or_an_explicit_error(
    fleet: Fleet, way: Way, action: str
) -> None:
    complete(await fleet.ask(way), way)
    complete(await fleet.ask(way), way)
    size = max(record.sent_bytes for node in fleet.nodes for record in node.requests(way.path))
    told = 0
    for cut in range(0, size, size // 40):
        fleet.fail_once(Fault(action, "after_bytes", path=way.path, bytes=cut))  # type: ignore[arg-type]
        heard = await fleet.ask(way)
        assert not heard.broken, f"cut at byte {cut}"
        if heard.error is None:
            complete(heard, way)
        else:
            told += 1
            assert way.stream and heard.status == 200 and not heard.ended, f"cut at byte {cut}"
            check_stream(heard.text, PROMPT, complete=False)
        for node in fleet.nodes:
            node.heal()
            proxy_node = fleet.proxy.sollol.fleet.nodes[node.host_port]
            proxy_node.health = type(proxy_node.health)()  # forty faults in a row are not the point here
    assert (told > 0) is way.stream


@pytest.mark.parametrize("way", [way for way in WAYS if not way.stream], ids=str)
@pytest.mark.parametrize("moment", ["before_end", "mid_line"])
async def test_an_answer_that_is_not_a_stream_is_replaced_even_at_its_last_byte(
    fleet: Fleet, way: Way, moment: str
) -> None:
    fleet.fail_once(rst(moment, path=way.path))
    complete(await fleet.ask(way), way)


@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_a_trickled_answer_is_whole(fleet: Fleet, way: Way) -> None:
    fleet.fail_once(trickle(3, 0.0005, path=way.path))
    complete(await fleet.ask(way), way)


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai-whole"]], ids=str)
async def test_all_nodes_failing_once_at_the_same_moment_is_only_a_delay(fleet: Fleet, way: Way) -> None:
    for node in fleet.nodes:
        node.fail(rst("before_head", path=way.path))
    complete(await fleet.ask(way), way)


async def test_the_only_node_left_is_waited_for_where_its_failures_have_just_ejected_it(fleet: Fleet) -> None:
    way, (sick, dead) = BY_NAME["chat"], fleet.nodes
    sick.fail(named("v024_terminated", path=way.path, times=3))  # the third one in a row ejects it
    while len(sick.requests(way.path)) < 2:
        complete(await fleet.ask(way), way)
    await dead.kill()
    complete(await fleet.ask(way), way)
    assert len(sick.requests(way.path)) == 4


async def test_nobody_is_turned_away_while_the_only_node_comes_back() -> None:
    way, only = BY_NAME["chat"], await FakeOllama().start()
    prompts = [f"[[id:{name}]] [[n:400]] count" for name in "abcd"]
    async with RunningProxy([only]) as proxy, aiohttp.ClientSession() as session:
        only.fail(named("v024_terminated", path=way.path, times=3))
        assert (await ask(session, proxy.url, way, PROMPT)).status == 500  # it failed twice there
        # The third failure ejects the node. Then it is given one request, which takes longer than all rounds.
        heards = await asyncio.gather(*(ask(session, proxy.url, way, prompt) for prompt in prompts))
    for heard, prompt in zip(heards, prompts, strict=True):
        complete(heard, way, prompt)
    await only.stop()


def wanted(proxy: RunningProxy) -> float:
    """Requests a second, as the proxy counts them when they arrive."""
    now_s = asyncio.get_running_loop().time()
    rate: float = proxy.sollol.speeds.demand.rate_per_s(LLAMA, None, now_s)
    return rate


async def decisions(session: aiohttp.ClientSession, proxy: RunningProxy) -> list[dict[str, Any]]:
    """What the journal says of requests that have ended."""
    async with session.get(f"{proxy.url}/sollol/decisions") as answer:
        found: list[dict[str, Any]] = (await answer.json())["requests"]
        return found


async def test_a_client_that_leaves_while_the_only_node_comes_back_is_forgotten_at_once() -> None:
    way, only = BY_NAME["chat"], await FakeOllama().start()
    async with RunningProxy([only]) as proxy, aiohttp.ClientSession() as session:
        (node,) = proxy.sollol.fleet
        node.health.polled()  # it came back: one at a time
        only.hold_tokens()
        first = asyncio.create_task(ask(session, proxy.url, way, PROMPT))
        await only.wait_received(1, path=way.path)
        seen = wanted(proxy)
        second = asyncio.create_task(ask(session, proxy.url, way, PROMPT))
        async with asyncio.timeout(10):
            while wanted(proxy) < 1.5 * seen:  # the proxy has it
                await asyncio.sleep(0.01)
            second.cancel()
            while not (gone := await decisions(session, proxy)):
                await asyncio.sleep(0.01)
        assert [each["outcome"] for each in gone] == ["client_left"]
        only.go_on()
        complete(await first, way)
        assert len(only.requests(way.path)) == 1
    await only.stop()


@pytest.mark.parametrize("make", [lambda: named("terminated", times=None), lambda: rst(times=None)])
@pytest.mark.parametrize(("size", "hits"), [(2, 4), (8, 6)])
async def test_a_request_that_kills_every_runner_is_given_up_before_it_has_killed_many(
    make: Callable[[], Fault], size: int, hits: int
) -> None:
    nodes = [await FakeOllama().start() for _ in range(size)]
    for node in nodes:
        fault = make()
        fault.path = "/api/chat"
        node.fail(fault)
    async with RunningProxy(nodes) as proxy, aiohttp.ClientSession() as session:
        heard = await ask(session, proxy.url, BY_NAME["chat"], PROMPT)
    assert heard.status in (500, 503) and heard.error
    assert sum(len(node.requests("/api/chat")) for node in nodes) == hits
    for node in nodes:
        await node.stop()


ALL_AT_ONCE = {
    "busy": (lambda: named("busy", times=None), 503, "busy"),
    "out of memory": (lambda: named("oom_cuda", times=None), 500, "out of memory"),
    "reset": (lambda: rst("before_head", path="/api/chat", times=None), 503, "no node can serve"),
    "broken": (lambda: named("terminated", times=None), 500, "terminated"),
}


@pytest.mark.parametrize("what", ALL_AT_ONCE)
async def test_all_nodes_failing_at_once_is_one_clear_error(fleet: Fleet, what: str) -> None:
    make, status, words = ALL_AT_ONCE[what]
    for node in fleet.nodes:
        fault = make()
        fault.path = "/api/chat"
        node.fail(fault)
    heard = await fleet.ask(BY_NAME["chat"])
    assert heard.status == status
    assert heard.error and words in heard.error


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai"], BY_NAME["anthropic"]], ids=str)
async def test_a_dead_fleet_says_so_in_the_protocol_that_was_spoken(fleet: Fleet, way: Way) -> None:
    for node in fleet.nodes:
        await node.kill()
    heard = await fleet.ask(way)
    assert heard.status == 503
    assert heard.error and all(node.host_port in heard.error for node in fleet.nodes)
    assert heard.headers["retry-after"]


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai-whole"]], ids=str)
async def test_a_fleet_that_never_answered_is_not_said_to_lack_the_model(way: Way) -> None:
    dead = "127.0.0.1:9"
    async with RunningProxy([dead]) as proxy, aiohttp.ClientSession() as session:
        heard = await ask(session, proxy.url, way, PROMPT)
    assert heard.status == 503
    assert heard.error and f"no node of the fleet answers: {dead}" in heard.error


async def test_a_client_that_leaves_before_the_head_frees_its_node(fleet: Fleet) -> None:
    fleet.fail_once(hang("before_head", path="/api/chat"))
    asking = asyncio.create_task(fleet.ask(BY_NAME["chat"]))
    async with asyncio.timeout(10):
        while not any(node.requests("/api/chat") for node in fleet.nodes):
            await asyncio.sleep(0.005)
    asking.cancel()
    node = next(node for node in fleet.nodes if node.requests("/api/chat"))
    await node.wait_finished(node.requests("/api/chat")[0])  # such a request ends only when its client leaves
    assert sum(len(node.requests("/api/chat")) for node in fleet.nodes) == 1, "nobody waits for it elsewhere"


async def test_a_client_that_leaves_in_mid_stream_ends_the_generation(fleet: Fleet) -> None:
    prompt = "[[id:long]] [[n:100000]]"
    body = BY_NAME["chat"].body(prompt)
    async with (
        aiohttp.ClientSession() as leaver,
        leaver.post(fleet.proxy.url + "/api/chat", json=body) as answer,
    ):
        await answer.content.readline()
        answer.close()
    node = next(node for node in fleet.nodes if node.requests("/api/chat"))
    record = await node.wait_finished(node.requests("/api/chat")[0])
    assert record.outcome == "cancelled"


async def test_two_hundred_streams_over_failing_nodes_keep_every_token_apart() -> None:
    nodes = [await FakeOllama(num_parallel=8).start() for _ in range(4)]
    for node in nodes[:2]:
        for _ in range(10):
            node.fail(rst("before_head", path="/api/chat"), named("busy", path="/api/chat"))
            node.fail(rst("after_head", path="/api/chat"), fin("mid_line", path="/api/chat"))
    connector = aiohttp.TCPConnector(limit=0)
    async with RunningProxy(nodes) as proxy, aiohttp.ClientSession(connector=connector) as session:
        prompts = [f"[[id:c{i}]] [[n:{5 + i % 37}]]" for i in range(200)]
        ways = [WAYS[i % 7] for i in range(200)]
        heards = await asyncio.gather(
            *(ask(session, proxy.url, way, prompt) for way, prompt in zip(ways, prompts, strict=True))
        )
    for heard, way, prompt in zip(heards, ways, prompts, strict=True):
        complete(heard, way, prompt)
    for node in nodes:
        node.heal()
        await node.stop()


async def test_a_client_that_leaves_while_its_request_waits_for_another_round_is_forgotten_at_once() -> None:
    nodes = [await FakeOllama().start() for _ in range(2)]
    for node in nodes:
        node.fail(named("busy", path="/api/chat", times=None))
    patient = {"backoff_s": 60, "backoff_max_s": 60}
    async with RunningProxy(nodes, retry=patient) as proxy, aiohttp.ClientSession() as session:
        asking = asyncio.create_task(ask(session, proxy.url, BY_NAME["chat"], PROMPT))
        for node in nodes:
            await node.wait_received(1, path="/api/chat")
        asking.cancel()
        async with asyncio.timeout(10):
            while True:
                async with session.get(f"{proxy.url}/sollol/decisions") as answer:
                    decisions = (await answer.json())["requests"]
                if decisions:
                    break
                await asyncio.sleep(0.01)
    assert decisions[0]["outcome"] == "client_left"
    assert [len(node.requests("/api/chat")) for node in nodes] == [1, 1]
    for node in nodes:
        await node.stop()
