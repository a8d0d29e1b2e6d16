"""Clients that are slow, silent, greedy or gone: what they see, what nodes get, who else is served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.fakes.raw import request_bytes
from tests.hostile import behaviours
from tests.hostile.conftest import House
from tests.hostile.forms import BODY, LAST, MIB, head, sized
from tests.hostile.wire import Conversation, answers

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Behaviour → the answers until the proxy ends the connection.
OUTCOMES: tuple[tuple[Callable[[int], Awaitable[Conversation]], tuple[int, ...]], ...] = (
    (behaviours.slow_head, (408,)),
    (behaviours.slow_odd_head, (408,)),
    (behaviours.simple_request, (408,)),
    (behaviours.half_a_body, (408,)),
    (behaviours.half_a_chunked_body, (408,)),
    (behaviours.body_never_sent, (408,)),
    (behaviours.silent, ()),
    (behaviours.silent_after_a_request, (200,)),
    (behaviours.half_a_request_behind_a_whole_one, (200, 408)),
    (behaviours.half_closed_in_a_head, ()),
    (behaviours.half_closed_in_a_body, ()),
    (behaviours.reset_in_a_body, ()),
)


@pytest.mark.parametrize(("behave", "statuses"), OUTCOMES, ids=[how.__name__ for how, _ in OUTCOMES])
async def test_a_client_that_is_slow_or_gone_reaches_no_node(
    house: House, behave: Callable[[int], Awaitable[Conversation]], statuses: tuple[int, ...]
) -> None:
    under_way = asyncio.ensure_future(behave(house.proxy.port))
    await house.answers_well()
    seen = await under_way
    assert tuple(answer.status for answer in seen.answers) == statuses
    assert all(answer.sentence for answer in seen.answers if answer.status >= 400)
    assert house.reached() == []


async def test_a_client_that_ends_its_side_counts_as_gone(house: House) -> None:
    """As with nginx: its request is given up, and with it the work of a node."""
    house.node.forget()
    await behaviours.half_closed(house.proxy.port)
    await house.answers_well()
    await house.node.server.notice.until(lambda: all(r.outcome != "open" for r in house.node.received))
    assert set(house.reached()) <= {("POST", "/api/chat")}


async def test_a_thousand_requests_in_one_go_are_answered_in_their_order(house: House) -> None:
    asked = [f"/api/{'tags' if i % 3 else 'version'}" for i in range(1000)]
    async with behaviours.connected(house.proxy.port) as (reader, writer):
        writer.write(b"".join(head(f"GET {path} HTTP/1.1") for path in asked) + LAST)
        await house.answers_well()  # while nothing is read
        came = answers(await reader.read(-1))
    assert [answer.status for answer in came] == [200] * 1001
    assert [b"version" in answer.body for answer in came] == [
        "version" in path for path in (*asked, "version")
    ]


async def test_what_is_sent_behind_a_streamed_answer_waits_with_its_client(house: House) -> None:
    """It is read no further than a little ahead, and it is not lost."""
    ahead = head("GET /api/version HTTP/1.1", b"X-Pad: " + b"a" * 8000)
    count = 24 * MIB // len(ahead)
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "[[id:s]] [[n:5]]"}]}
    house.node.hold_tokens()
    try:
        async with behaviours.connected(house.proxy.port) as (reader, writer):
            writer.write(request_bytes("/api/chat", body) + ahead * count + LAST)
            await house.node.server.notice.until(lambda: bool(house.node.requests("/api/chat")))
            async with house.session.get(f"{house.proxy.url}/api/tags") as others:
                assert others.status == 200
            kept = writer.transport.get_write_buffer_size()
            house.node.go_on()
            seen = await behaviours.to_its_end(reader)
            came = seen.answers
    finally:
        house.node.go_on()
    assert kept > 12 * MIB, "the proxy takes in what it cannot serve yet"
    if house.way == "layers":  # which cannot stop reading: it hangs up
        assert came == []
        return
    assert [answer.status for answer in came] == [200] * (count + 2)
    assert came[0].body.count(b" s-") == 5
    house.reached()


async def test_a_client_that_reads_nothing_stops_its_node_and_nobody_else(house: House) -> None:
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "[[id:deaf]] [[n:300000]]"}]}
    house.node.forget()
    async with behaviours.connected(house.proxy.port) as (_, writer):
        writer.transport.pause_reading()
        writer.write(request_bytes("/api/chat", body))
        await house.node.server.notice.until(lambda: bool(house.node.requests("/api/chat")))
        for _ in range(5):
            await house.answers_well()
        deaf = next(r for r in house.node.requests("/api/chat") if b"deaf" in r.body)
        assert deaf.outcome == "open" and deaf.chunks < 300_000
    await house.node.server.notice.until(lambda: deaf.outcome == "cancelled")
    house.reached()


async def test_an_upload_that_breaks_off_is_broken_off_at_the_node(house: House) -> None:
    path = f"/api/blobs/sha256:{'0' * 64}"
    house.node.forget()
    async with behaviours.connected(house.proxy.port) as (_, writer):
        writer.write(head(f"POST {path} HTTP/1.1", "Content-Length: 1000000"))
        writer.write(bytes(200_000))
        await house.node.server.notice.until(lambda: bool(house.node.requests(path, "POST")))
    uploads = house.node.requests(path, "POST")
    await house.node.server.notice.until(lambda: uploads[0].outcome != "open")
    assert [upload.outcome for upload in uploads] == ["cancelled"]
    house.tap.forget()
    await house.answers_well()


async def test_an_answer_that_was_broken_off_is_none(house: House) -> None:
    """The same client, ten times over: nothing of it is left behind."""
    for _ in range(10):
        async with behaviours.connected(house.proxy.port) as (reader, writer):
            writer.write(sized(BODY.replace(b"false", b"true").replace(b"n:1]", b"n:5000]")))
            await reader.read(100)
    await house.node.server.notice.until(lambda: all(r.outcome != "open" for r in house.node.received))
    await house.answers_well()
    house.reached()
