"""A defect in any hook of any addon: a clear error for the client, one traceback in the log, one count.

The hooks are those of the chain as it stands (``protect.hooks_of``), and each is tried with every kind of
request below: a hook or an addon that is new is covered by being there. One that no request reaches fails.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import pytest

from proxy_addon.chain import Sollol
from proxy_addon.protect import INSTEAD, hooks_of
from proxy_addon.settings import Settings
from tests.fakes.faults import hang, rst
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, MODEL, Heard, Way, ask
from tests.proxy.running import RunningProxy

PROMPT = "[[id:boom]] [[n:4]]"
REQUEST_ID = "x-sollol-request-id"
BLOB = f"/api/blobs/sha256:{'0' * 64}"


def chain() -> list[tuple[type, str]]:
    """Every hook of every addon."""
    with tempfile.TemporaryDirectory() as folder:
        sollol = Sollol(Settings.model_validate({"state_dir": folder, "nodes": ["127.0.0.1:9"]}))
    return [(type(addon), hook) for addon in sollol.addons for hook in hooks_of(addon)]


class Defect:
    """Raises in place of one hook, once each time that it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.met = asyncio.Event()

    def arm(self) -> None:
        self.armed = True
        self.met.clear()

    def strike(self) -> None:
        if self.armed:
            self.armed = False
            self.met.set()
            raise ZeroDivisionError("a defect")

    def into(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(hook):

            async def broken_async(*args: Any) -> Any:
                self.strike()
                return await hook(*args)

            return broken_async

        def broken(*args: Any) -> Any:
            self.strike()
            return hook(*args)

        return broken


@dataclass
class House:
    """Two nodes, the proxy over them, and what counts its defects."""

    nodes: list[FakeOllama]
    proxy: RunningProxy
    defect: Defect

    def counted(self) -> float:
        text = self.proxy.sollol.telemetry.expose("")[0].decode()
        return sum(map(float, re.findall(r"^sollol_hook_errors_total\{.*\} (\S+)$", text, re.MULTILINE)))

    async def in_flight(self) -> tuple[int, int]:
        """What the proxy itself says that it has on nodes and in its line."""
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{self.proxy.url}/sollol/nodes") as answer:
                nodes = (await answer.json())["nodes"]
            async with session.get(f"{self.proxy.url}/sollol/queue") as answer:
                queue = (await answer.json())["queue"]
        return sum(node["in_flight"] for node in nodes), len(queue)


# -- the kinds of request, each with what a client of it hears where all is well ---------------------------

Asking = Callable[[House, aiohttp.ClientSession], Awaitable[Heard]]


def asked(way: Way, failing: bool = False) -> Asking:
    async def asking(house: House, session: aiohttp.ClientSession) -> Heard:
        if failing:
            fault = rst("before_head", path=way.path)
            for node in house.nodes:
                node.fail(fault)  # the same: the first of them that is asked breaks off
        heard = await ask(session, house.proxy.url, way, PROMPT)
        for node in house.nodes:
            node.heal()
        if heard.status == 200:
            assert heard.ended and not heard.broken and heard.error is None
            check_stream(heard.text, PROMPT)
        return heard

    return asking


async def unreachable(house: House, session: aiohttp.ClientSession) -> Heard:
    """One node refuses connections, and the proxy does not know it yet: of two requests one goes there."""
    await house.nodes[0].kill()
    for _ in house.nodes:
        heard = await asked(BY_NAME["chat-whole"])(house, session)
        if house.defect.met.is_set():
            break
    await house.nodes[0].restart()
    return heard


async def upload(house: House, session: aiohttp.ClientSession) -> Heard:
    async with session.post(house.proxy.url + BLOB, data=b"x" * 100_000) as answer:
        heard = Heard(answer.status, {k.lower(): v for k, v in answer.headers.items()})
        heard.raw = await answer.read()
    if heard.status != 400:  # the node says so: these bytes have another digest
        heard.error = orjson.loads(heard.raw)["error"]
    return heard


async def pull(house: House, session: aiohttp.ClientSession) -> Heard:
    async with session.post(f"{house.proxy.url}/api/pull", json={"model": MODEL}) as answer:
        heard = Heard(answer.status, {k.lower(): v for k, v in answer.headers.items()})
        heard.raw = await answer.read()
    rows = [orjson.loads(line) for line in heard.raw.splitlines()]
    heard.error = next((row["error"] for row in rows if "error" in row), None)
    assert heard.error or rows[-1] == {"status": "success"}
    return heard


async def create(house: House, session: aiohttp.ClientSession) -> Heard:
    body = {"model": "mine", "from": MODEL, "stream": False}
    async with session.post(f"{house.proxy.url}/api/create", json=body) as answer:
        heard = Heard(answer.status, {k.lower(): v for k, v in answer.headers.items()})
        heard.raw = await answer.read()
    heard.error = orjson.loads(heard.raw).get("error")
    return heard


async def leaving(house: House, session: aiohttp.ClientSession) -> Heard:
    """The client goes in the middle of its answer."""
    way = BY_NAME["chat"]
    for node in house.nodes:
        node.fail(hang("after_chunks", chunks=1, path=way.path))
    freed, on_freed = asyncio.Event(), house.proxy.sollol.fleet.on_freed
    on_freed.append(freed.set)
    async with session.post(house.proxy.url + way.path, json=way.body(PROMPT)) as answer:
        heard = Heard(answer.status, {k.lower(): v for k, v in answer.headers.items()})
        if heard.status == 200:
            await answer.content.readline()
            answer.close()
        else:
            heard.raw = await answer.read()
            way.read(heard)
    if heard.status == 200:
        async with asyncio.timeout(10.0):
            await freed.wait()
    on_freed.remove(freed.set)
    for node in house.nodes:
        node.heal()
    return heard


async def connecting(house: House, _session: aiohttp.ClientSession) -> Heard:
    """CONNECT to the port that is a forward proxy, which refuses it."""
    host, port = house.proxy.master.addons.get("proxyserver").listen_addrs()[1]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"CONNECT 127.0.0.1:9 HTTP/1.1\r\nHost: 127.0.0.1:9\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    heard = Heard(int(status.split()[1]), headers)
    heard.raw = await reader.readexactly(int(headers["content-length"]))
    heard.error = orjson.loads(heard.raw)["error"]
    writer.close()
    return heard


WAYS = ("chat", "chat-whole", "openai", "openai-whole", "anthropic", "anthropic-whole")
REQUESTS: dict[str, Asking] = {
    **{name: asked(BY_NAME[name]) for name in WAYS},
    **{f"{name}, failing over": asked(BY_NAME[name], failing=True) for name in WAYS[::2]},
    "upload": upload,
    "pull": pull,
    "create": create,
    "leaving": leaving,
    "CONNECT": connecting,
    "unreachable": unreachable,
}


#: CONNECT belongs to forward proxies.
MORE: dict[str, Any] = {"modes": ["regular@127.0.0.2:0"]}


# -- the tests ---------------------------------------------------------------------------------------------


async def no_ports() -> None:
    """The ports stay open: only who is left is looked at."""


@asynccontextmanager
async def running(defect: Defect, splice: bool) -> AsyncIterator[House]:
    nodes = [await FakeOllama(remote=[MODEL]).start() for _ in range(2)]
    # No poll on its own: nodes that refuse for a moment are not known to be lost before they are asked.
    polls = {"interval_s": 60, "timeout_s": 1.0, "failures_to_lose": 100}
    async with RunningProxy(nodes, placement="round_robin", poll=polls, splice=splice, **MORE) as proxy:
        yield House(nodes, proxy, defect)
        await proxy.sollol.drain.wait(5.0, no_ports)
    for node in nodes:
        await node.stop()


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log's records with the defect's traceback."""
    return [entry.getMessage() for entry in caplog.records if "a defect" in str(entry.exc_info)]


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
@pytest.mark.parametrize(("addon", "hook"), chain(), ids=lambda value: getattr(value, "__name__", value))
async def test_a_defect_in_a_hook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, addon: type, hook: str, splice: bool
) -> None:
    defect = Defect()
    monkeypatch.setattr(addon, hook, defect.into(getattr(addon, hook)))
    reached = []
    with caplog.at_level(logging.WARNING):
        async with running(defect, splice) as house:
            for name, asking in REQUESTS.items():
                caplog.clear()
                before = house.counted()
                defect.arm()
                async with aiohttp.ClientSession() as session:
                    heard = await asking(house, session)
                    if hook == "client_disconnected" and (name == "CONNECT" or not splice):
                        await session.close()
                        await defect.met.wait()
                    was_met, defect.armed = defect.met.is_set(), False
                    assert house.counted() - before == was_met, name
                    told = tracebacks(caplog)
                    assert len(told) == was_met, name
                    if was_met:
                        reached.append(name)
                        seen_as_promised(hook, heard, name)
                        if hook != "client_disconnected" and (of := heard.headers.get(REQUEST_ID)):
                            assert of in told[0], name
                    if not session.closed:
                        await asked(BY_NAME["chat-whole"])(house, session)
            assert await house.in_flight() == (0, 0)
    assert reached, f"no request of {__name__} comes to {addon.__name__}.{hook}"
    assert "cut off" not in caplog.text  # nor did the drain find one open


def seen_as_promised(hook: str, heard: Heard, name: str) -> None:
    """What a client must see of a request whose ``hook`` has failed."""
    if hook == "sollol_next_chunk":
        assert (heard.status, name) == (200, "pull")
        assert heard.error and "SOLLOL failed" in heard.error
    elif hook in INSTEAD:
        assert heard.status == 500, name
        assert heard.error and "SOLLOL failed" in heard.error, name
        assert heard.headers[REQUEST_ID] in heard.error
    else:
        assert not (heard.error and "SOLLOL failed" in heard.error), name
