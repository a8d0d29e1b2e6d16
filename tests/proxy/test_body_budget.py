"""What all clients together may have the proxy hold: the budget as a value, and through the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from proxy_addon.body_budget import BodyBudget, Held
from proxy_addon.settings import Settings
from tests.fakes.faults import reply
from tests.fakes.ollama_node import FakeOllama
from tests.proxy.running import RunningProxy, with_slots

BUDGET = 300_000
BIG = 200_000  #: two of them are more than the budget
SENTENCE = (
    f"the bodies of all requests together are larger than {BUDGET} bytes"
    " (guard.buffered_bytes); try again shortly"
)
both_ways = pytest.mark.parametrize("splice", [True, False], ids=["lane", "layers"])
#: How each protocol says it.
SAID: dict[str, dict[str, Any]] = {
    "/api/chat": {"error": SENTENCE},
    "/v1/chat/completions": {
        "error": {"message": SENTENCE, "type": "api_error", "param": None, "code": None}
    },
    "/v1/messages": {"type": "error", "error": {"type": "overloaded_error", "message": SENTENCE}},
}


# -- the budget ------------------------------------------------------------------------------------------


def test_what_is_let_go_of_is_there_for_others() -> None:
    budget = BodyBudget(100)
    one, other = Held(budget, 100), Held(budget, 100)
    assert one.grow(60) is None
    refused = other.grow(41)
    assert refused is not None
    assert (refused.status, refused.headers) == (503, {"retry-after": "2"})
    assert other.grow(40) is None
    one.let_go()
    one.let_go()
    assert Held(budget, 100).announced(61) is not None
    assert Held(budget, 100).grow(60) is None


def test_of_two_that_grow_past_it_together_one_goes_on() -> None:
    """Who is refused gives back what it had at once, not when its answer is written."""
    budget = BodyBudget(100)
    one, other = Held(budget, 100), Held(budget, 100)
    assert (one.grow(50), other.grow(50)) == (None, None)
    assert one.grow(10) is not None
    assert other.grow(50) is None


def test_what_is_announced_is_checked_and_does_not_count() -> None:
    budget = BodyBudget(100)
    assert Held(budget, 100).announced(100) is None
    assert budget.held_bytes == 0
    assert Held(budget, 100).grow(1) is None
    refused = Held(budget, 100).announced(100)
    assert refused is not None and refused.status == 503


@pytest.mark.parametrize(
    ("limit_bytes", "told"),
    [(50, "50 bytes (guard.body_limit_bytes)"), (1000, "100 bytes (guard.buffered_bytes)")],
)
def test_what_can_never_be_held_is_not_worth_another_try(limit_bytes: int, told: str) -> None:
    held = Held(BodyBudget(100), limit_bytes)
    assert held.grow(50) is None
    for refused in (held.grow(51), Held(BodyBudget(100), limit_bytes).announced(101)):
        assert refused is not None
        assert (refused.status, refused.message) == (413, f"the request body is larger than {told}")


def test_what_is_passed_on_has_no_limit() -> None:
    assert Held(BodyBudget(100), None).announced(1 << 40) is None


def test_another_limit_holds_from_then_on() -> None:
    budget = BodyBudget(100)
    held = Held(budget, 1000)
    assert held.grow(100) is None
    budget.reconfigure(Settings.model_validate({"guard": {"buffered_bytes": 50}}))
    refused = Held(budget, 1000).grow(1)
    assert refused is not None and refused.status == 503
    held.let_go()
    assert Held(budget, 1000).grow(50) is None


# -- through the proxy -----------------------------------------------------------------------------------


def body(size: int = BIG, **more: Any) -> bytes:
    """A request that is answered, of ``size`` bytes."""
    asked: dict[str, Any] = {"model": "llama3.2", "stream": False, "max_tokens": 8, **more}
    asked["messages"] = [{"role": "user", "content": ""}]
    filler = "a" * (size - len(orjson.dumps(asked)))
    asked["messages"] = [{"role": "user", "content": filler}]
    made = orjson.dumps(asked)
    assert len(made) == size
    return made


def head(*fields: str, path: str = "/api/chat") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """The next whole answer on a connection, of a length that is told."""
    async with asyncio.timeout(10):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        split = (line.partition(":") for line in lines[1:-2])
        fields = {name.lower(): value.strip() for name, _, value in split}
        return int(lines[0].split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


class House:
    """A node that keeps whom it serves waiting, the proxy, a client."""

    def __init__(self, node: FakeOllama, proxy: RunningProxy, session: aiohttp.ClientSession) -> None:
        self.node, self.proxy, self.session = node, proxy, session

    async def post(self, size: int = BIG, path: str = "/api/chat", **more: Any) -> int:
        """Ask with so many bytes to the end of the answer; the status."""
        async with self.session.post(self.proxy.url + path, data=body(size, **more)) as answer:
            await answer.read()
            return answer.status

    async def comes_to(self, status: int) -> None:
        """Ask for what no node has until ``status`` is answered: 503 without room for it, else 404."""
        async with asyncio.timeout(10):
            while await self.post(model="missing") != status:
                continue

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def held_by_one(self, count: int = 1) -> asyncio.Task[int]:
        """Somebody whose large request is at the node, and stays there until it may go on."""
        self.node.hold_tokens()
        asking = asyncio.ensure_future(self.post())
        await self.node.wait_received(count, "/api/chat")
        return asking


@asynccontextmanager
async def house(splice: bool, **settings: Any) -> AsyncIterator[House]:
    guard = {"buffered_bytes": BUDGET, **settings.pop("guard", {})}
    async with (
        FakeOllama(num_parallel=4) as node,
        RunningProxy([with_slots(node, 4)], splice=splice, guard=guard, **settings) as proxy,
        aiohttp.ClientSession() as session,
    ):
        yield House(node, proxy, session)


@both_ways
@pytest.mark.parametrize("path", SAID)
async def test_who_announces_more_than_is_left_is_told_at_once_and_may_come_again(
    splice: bool, path: str
) -> None:
    async with house(splice) as found, found.connected() as (reader, writer):
        asking = await found.held_by_one()
        writer.write(head(f"Content-Length: {BIG}", path=path))
        status, fields, said = await answer_of(reader)
        assert (status, fields["retry-after"]) == (503, "2")
        told = orjson.loads(said)
        told.pop("request_id", None)
        assert told == SAID[path]
        writer.write(body())  # which it had begun to send: read away
        small = body(1000)
        writer.write(head(f"Content-Length: {len(small)}") + small)
        await found.node.wait_received(2, "/api/chat")
        found.node.go_on()
        assert (await answer_of(reader))[0] == 200
        assert await asking == 200
        assert await found.post() == 200


@both_ways
async def test_a_body_that_outgrows_what_is_left_is_refused_while_it_comes(splice: bool) -> None:
    async with house(splice) as found, found.connected() as (reader, writer):
        asking = await found.held_by_one()
        piece = b"186A0\r\n" + b"a" * 100_000 + b"\r\n"
        writer.write(head("Transfer-Encoding: chunked") + piece + piece)  # and not its end
        status, fields, _ = await answer_of(reader)
        assert (status, fields["retry-after"]) == (503, "2")
        small = body(1000)
        writer.write(b"0\r\n\r\n" + head(f"Content-Length: {len(small)}") + small)
        await found.node.wait_received(2, "/api/chat")
        found.node.go_on()
        assert (await answer_of(reader))[0] == 200
        assert await asking == 200
        assert await found.post() == 200
        assert len(found.node.requests("/api/chat")) == 3


@both_ways
async def test_who_only_announces_keeps_nobody_out(splice: bool) -> None:
    async with house(splice) as found, found.connected() as (_, writer):
        writer.write(head(f"Content-Length: {BIG}"))
        assert await found.post() == 200


@both_ways
async def test_what_was_half_sent_counts_until_its_client_leaves(splice: bool) -> None:
    async with house(splice) as found:
        async with found.connected() as (_, writer):
            writer.write(head(f"Content-Length: {BIG}") + body()[:-1])
            await found.comes_to(503)
        await found.comes_to(404)


@both_ways
async def test_all_of_it_is_given_back_however_a_request_ends(splice: bool) -> None:
    async with house(splice, retry={"rounds": 1}) as found:
        for _ in range(3):
            assert await found.post() == 200
            assert await found.post(stream=True) == 200
            assert await found.post(model="missing") == 404
            assert await found.post(path="/api/nowhere") == 404
            assert await found.post(stream=3) == 400
        found.node.fail(reply(500, "llama runner process has terminated", times=None))
        assert await found.post() >= 500
        found.node.heal()
        await found.comes_to(404)


@both_ways
async def test_and_when_its_client_leaves_while_a_node_works_on_it(splice: bool) -> None:
    async with house(splice) as found:
        asking = await found.held_by_one()
        await found.comes_to(503)
        asking.cancel()
        await found.comes_to(404)
        found.node.go_on()


@both_ways
async def test_what_the_largest_body_may_be_is_not_more_than_all_may(splice: bool) -> None:
    async with house(splice) as found, found.connected() as (reader, writer):
        writer.write(head(f"Content-Length: {BUDGET + 1}"))
        status, fields, said = await answer_of(reader)
        assert (status, "retry-after" in fields) == (413, False)
        assert b"guard.buffered_bytes" in said


@both_ways
async def test_only_uploads_are_without_limit(splice: bool) -> None:
    """Of a blob, which is passed on; what is not an upload is held, and so has one."""
    async with house(splice) as found, found.connected() as (reader, writer):
        path = f"/api/blobs/sha256:{'0' * 64}"
        writer.write(
            f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {BUDGET + 1}\r\n\r\n".encode()
        )
        assert (await answer_of(reader))[0] == 413


@both_ways
async def test_a_reload_changes_it(splice: bool) -> None:
    async with house(splice) as found:
        assert await found.post() == 200
        changed = found.proxy.settings.model_dump() | {"guard": {"buffered_bytes": BIG - 1}}
        found.proxy.sollol.reconfigure(Settings.model_validate(changed))
        assert await found.post() == 413
        found.proxy.sollol.reconfigure(found.proxy.settings)
        assert await found.post() == 200
