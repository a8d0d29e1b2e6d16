"""What several proxies share through an agent: over real WebSockets, who may, what is heard and forgotten."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, WSServerHandshakeError

from agent import in_flight, server
from agent.in_flight import MOST_PROXIES, Member, Row, Shares
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import FakeModel

CHAT = {"path": "/api/chat", "model": "m:latest"}


class Proxy:
    """One side of a share, as any proxy may be."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket
        self.others = 0
        self.rows: dict[str, Any] = {}

    async def tell(self, **rows: Any) -> None:
        await self.socket.send_str(json.dumps(rows))

    async def hear(self, holds: Callable[[Proxy], bool]) -> None:
        """Take what comes until it ``holds``."""
        while not holds(self):
            message = await self.socket.receive(10)
            assert message.type is WSMsgType.TEXT, message
            news = json.loads(message.data)
            self.others = news["others"]
            self.rows = {id_: row for id_, row in (self.rows | news["rows"]).items() if row is not None}


class House:
    """An agent, and proxies that come to it."""

    def __init__(self, agent: FakeAgent, session: ClientSession, stack: AsyncExitStack) -> None:
        self.agent, self.session, self._stack = agent, session, stack

    async def join(self, name: str, token: str | None = None) -> Proxy:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{self.agent.url}{in_flight.PATH}?proxy={name}"
        return Proxy(await self._stack.enter_async_context(self.session.ws_connect(url, headers=headers)))

    async def total(self) -> int | None:
        async with self.session.get(self.agent.url + "/v1/report") as answer:
            found: int | None = (await answer.json())["ollama"]["requests_in_flight"]
            return found


type Open = Callable[..., Awaitable[House]]


@pytest.fixture
async def house() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession())

        async def start(token: str | None = None) -> House:
            node = await stack.enter_async_context(FakeOllama([FakeModel("m")]))
            agent = await stack.enter_async_context(FakeAgent(node, token=token))
            return House(agent, session, stack)

        yield start


async def test_each_hears_of_the_others_and_never_of_itself(house: Open) -> None:
    here = await house()
    assert await here.total() is None
    one = await here.join("one")
    await one.hear(lambda p: True)
    assert (one.others, one.rows) == (0, {})
    await one.tell(a={**CHAT, "expected_s": 2.5}, b=CHAT)
    two = await here.join("two")  # it hears what was told before it came
    await two.hear(lambda p: len(p.rows) == 2)
    assert two.rows["one a"]["expected_s"] == 2.5
    await two.tell(a=CHAT)
    await one.hear(lambda p: len(p.rows) == 1)
    assert set(one.rows) == {"two a"}
    assert await here.total() == 3
    await one.tell(a=None, unknown=None)
    await two.hear(lambda p: len(p.rows) == 1)
    assert set(two.rows) == {"one b"}
    assert await here.total() == 2


async def test_a_line_is_heard_of_and_is_no_request(house: Open) -> None:
    here = await house()
    one, two = await here.join("one"), await here.join("two")
    await one.tell(a=CHAT, **{"line m": {"path": "", "model": "m:latest", "waits": 7}})
    await two.hear(lambda p: len(p.rows) == 2)
    assert two.rows["one line m"]["waits"] == 7
    assert await here.total() == 1


async def test_a_share_ends_with_its_connection(house: Open) -> None:
    here = await house()
    one, two = await here.join("one"), await here.join("two")
    await one.tell(a=CHAT)
    await two.hear(lambda p: len(p.rows) == 1)
    assert one.socket._conn is not None and one.socket._conn.transport is not None
    one.socket._conn.transport.abort()  # what the kernel does for a process that was killed
    await two.hear(lambda p: not p.rows and not p.others)
    assert await here.total() == 0


async def test_who_comes_again_takes_the_place_of_its_former_connection(house: Open) -> None:
    here = await house()
    before, two = await here.join("one"), await here.join("two")
    await before.tell(a=CHAT)
    await two.hear(lambda p: len(p.rows) == 1)
    again = await here.join("one")
    await two.hear(lambda p: not p.rows)
    await again.tell(a=CHAT)
    await two.hear(lambda p: len(p.rows) == 1)
    while (message := await before.socket.receive(10)).type is WSMsgType.TEXT:
        pass
    assert (message.type, message.extra) == (WSMsgType.CLOSE, "it has connected again")
    assert await here.total() == 1


async def test_times_go_on_while_they_wait_at_the_agent() -> None:
    shares = Shares()
    member = shares.join("one", lambda: None)
    member.tell({"a": Row(path="/api/chat", model="m", age_s=1.0, answering_s=0.5)}, 100.0)
    later = shares.join("two", lambda: None).take(103.0).rows["one a"]
    assert later is not None and (later.age_s, later.answering_s) == (4.0, 3.5)


async def test_from_another_machine_it_takes_the_token(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    here = await house(token="s3cret")
    await here.join("local")
    monkeypatch.setattr(server, "is_loopback", lambda request: False)
    for token, status in ((None, 403), ("wrong", 401)):
        with pytest.raises(WSServerHandshakeError) as refused:
            await here.join("stranger", token)
        assert refused.value.status == status
    await (one := await here.join("one", "s3cret")).tell(a=CHAT)
    await one.socket.close()
    async with here.session.get(here.agent.url + in_flight.PATH + "?proxy=p") as answer:
        assert (await answer.json())["error"].startswith("to share what is in flight from another machine")
    async with here.session.get(here.agent.url + "/metrics") as answer:
        assert "sollol_agent_in_flight_refused_total 2.0" in await answer.text()


async def test_without_a_token_nobody_from_afar_shares(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    here = await house()
    monkeypatch.setattr(server, "is_loopback", lambda request: False)
    with pytest.raises(WSServerHandshakeError) as refused:
        await here.join("one", "anything")
    assert refused.value.status == 403


async def test_a_page_from_elsewhere_may_not_share(house: Open) -> None:
    here = await house()
    with pytest.raises(WSServerHandshakeError) as refused:
        await here.session.ws_connect(
            f"{here.agent.url}{in_flight.PATH}?proxy=page", headers={"Origin": "https://evil.example"}
        )
    assert refused.value.status == 403


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b"])
async def test_a_proxy_needs_a_name(house: Open, name: str) -> None:
    here = await house()
    with pytest.raises(WSServerHandshakeError) as refused:
        await here.join(name)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("nonsense", "Invalid JSON"),
        ("[1]", "object"),
        ('{"a": {"path": "/api/chat"}}', "a.model"),
        ('{"a": {"path": "/api/chat", "model": "m", "age_s": -1}}', "a.age_s"),
        ('{"a": {"path": "/api/chat", "model": "m", "expected_s": 1e99}}', "a.expected_s"),
    ],
)
async def test_nonsense_ends_the_share_with_a_reason(house: Open, told: str, why: str) -> None:
    here = await house()
    one, two = await here.join("one"), await here.join("two")
    await one.tell(a=CHAT)
    await two.hear(lambda p: len(p.rows) == 1)
    await one.socket.send_str(told)
    while (message := await one.socket.receive(10)).type is WSMsgType.TEXT:
        pass
    assert message.type is WSMsgType.CLOSE and why in str(message.extra)
    await two.hear(lambda p: not p.rows)


async def test_one_proxy_cannot_fill_the_memory(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "MOST_ROWS", 3)
    here = await house()
    one = await here.join("one")
    for number in range(5):
        await one.tell(**{str(number): CHAT})
    while (message := await one.socket.receive(10)).type is WSMsgType.TEXT:
        pass
    assert (message.type, message.extra) == (WSMsgType.CLOSE, "a proxy has at most 3 requests on a node")


def test_there_is_room_for_so_many_proxies() -> None:
    shares = Shares()
    members: list[Member] = [shares.join(f"p{number}", lambda: None) for number in range(MOST_PROXIES)]
    assert not shares.has_room_for("one more") and shares.has_room_for("p1")
    members[0].leave()
    assert shares.has_room_for("one more")
