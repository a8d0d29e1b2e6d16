"""Defects outside of hooks: in what is called for pieces, at ends, by timers, and in the background."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy_addon import defects
from proxy_addon.chain import Sollol
from proxy_addon.fleet.discovery import Discovery
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node_watch import NodeWatch
from proxy_addon.fleet.watch import Watch
from proxy_addon.journal import Journal
from proxy_addon.record import Record
from proxy_addon.relay import Tee
from proxy_addon.replicas.keeper import Keeper
from proxy_addon.settings import Settings
from proxy_addon.telemetry import Telemetry
from proxy_addon.timeouts import Timeouts
from tests.fakes.faults import hang
from tests.fakes.fixtures import NodeFactory
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy

PROMPT = "[[id:boom]] [[n:4]]"
SPLICE = pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])


def break_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Let ``owner.name`` raise the next time that it is called; the list then has one item."""
    struck: list[int] = []
    original: Callable[..., Any] = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if not struck:
            struck.append(1)
            raise ZeroDivisionError("a defect")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    return struck


def counted(proxy: RunningProxy) -> dict[str, float]:
    """How many defects were counted, by where."""
    text = proxy.sollol.telemetry.expose("")[0].decode()
    found = re.findall(r'^sollol_hook_errors_total\{hook="(.*)"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if "a defect" in str(entry.exc_info)]


@SPLICE
@pytest.mark.parametrize("name", ["chat", "openai", "anthropic", "chat-whole"])
async def test_a_defect_in_a_piece_of_an_answer_cuts_it(
    ollama_node: NodeFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    splice: bool,
    name: str,
) -> None:
    """The head is out: a stream ends with an error in its protocol, another answer with its connection."""
    node, way = await ollama_node(), BY_NAME[name]
    async with RunningProxy([node], splice=splice) as proxy, aiohttp.ClientSession() as session:
        struck = break_once(monkeypatch, Tee, "__call__")
        heard = await ask(session, proxy.url, way, PROMPT)
        assert struck and not heard.ended
        assert heard.status == 500 or heard.broken or (heard.error and "SOLLOL failed" in heard.error)
        assert counted(proxy) == {"stream": 1}
        assert len(told(caplog)) == 1 and heard.headers["x-sollol-request-id"] in told(caplog)[0]
        assert not proxy.sollol.dispatch.in_flight
        again = await ask(session, proxy.url, way, PROMPT)
        check_stream(again.text, PROMPT)


@SPLICE
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Journal, "add"), (Telemetry, "observe"), (Keeper, "observe"), (Speeds, "observe")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_defect_in_what_is_told_of_an_end_keeps_nobody_else_from_it(
    ollama_node: NodeFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    splice: bool,
    owner: type,
    name: str,
) -> None:
    struck = break_once(monkeypatch, owner, name)
    node = await ollama_node()
    async with RunningProxy([node], splice=splice) as proxy, aiohttp.ClientSession() as session:
        heard = await ask(session, proxy.url, BY_NAME["chat"], PROMPT)
        check_stream(heard.text, PROMPT)
        assert struck and sum(counted(proxy).values()) == 1
        assert len(told(caplog)) == 1 and heard.headers["x-sollol-request-id"] in told(caplog)[0]
        assert not proxy.sollol.dispatch.in_flight
        if owner is not Journal:  # which is the first of them
            assert proxy.sollol.journal.recent(1)[0]["id"] == heard.headers["x-sollol-request-id"]


@SPLICE
async def test_a_defect_in_what_is_done_instead_of_a_hook_is_told_as_well(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, splice: bool
) -> None:
    hook, instead = (break_once(monkeypatch, Timeouts, name) for name in ("response", "let_go"))
    node = await ollama_node()
    async with RunningProxy([node], splice=splice) as proxy, aiohttp.ClientSession() as session:
        heard = await ask(session, proxy.url, BY_NAME["chat"], PROMPT)
        check_stream(heard.text, PROMPT)
        assert hook and instead
        assert counted(proxy) == {"response": 1, "instead": 1}
        assert len(told(caplog)) == 2
        assert not proxy.sollol.dispatch.in_flight
        check_stream((await ask(session, proxy.url, BY_NAME["chat"], PROMPT)).text, PROMPT)


@SPLICE
async def test_a_defect_in_a_timer_is_told_and_another_limit_still_holds(
    ollama_node: NodeFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, splice: bool
) -> None:
    struck = break_once(monkeypatch, Timeouts, "_idle")
    node, way = await ollama_node(), BY_NAME["chat"]
    node.fail(hang("after_chunks", chunks=2, path=way.path))
    limits = {"idle_s": 0.2}
    async with (
        RunningProxy([node], timeouts=limits, splice=splice) as proxy,
        aiohttp.ClientSession() as session,
    ):
        heard = await ask(session, proxy.url, way, PROMPT)
        assert struck and not heard.ended and (heard.error or heard.broken)
        assert sum(counted(proxy).values()) == 1
        assert len(told(caplog)) == 1 and heard.headers["x-sollol-request-id"] in told(caplog)[0]
        assert not proxy.sollol.dispatch.in_flight


async def test_who_waits_for_a_client_that_left_is_told_whatever_another_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts: list[str] = []
    defects.listen(counts.append)
    record, heard = Record("0" * 16, "native", 0.0, ""), []

    def broken() -> None:
        raise ZeroDivisionError("a defect")

    record.on_left += [broken, lambda: heard.append("told")]
    record.client_left()
    assert (counts, heard) == (["on_left"], ["told"])
    assert len(told(caplog)) == 1 and record.id in told(caplog)[0]


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [(Watch, "follow", "watch"), (NodeWatch, "_look", "poll"), (Discovery, "refresh", "discovery")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_defect_in_the_background_is_told_and_the_work_goes_on(
    ollama_node: NodeFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
    where: str,
) -> None:
    monkeypatch.setattr(defects, "RESTART_S", 0.01)
    node, again = await ollama_node(), asyncio.Event()
    async with RunningProxy([node], discovery={"dns_refresh_s": 0.05}) as proxy:
        original, calls = getattr(owner, name), []

        def broken(self: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError("a defect")
            again.set()
            return original(self)

        monkeypatch.setattr(owner, name, broken)
        async with asyncio.timeout(10.0):
            await again.wait()
        assert counted(proxy) == {where: 1}
    assert len(told(caplog)) == 1


async def test_a_proxy_that_cannot_start_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    break_once(monkeypatch, Discovery, "start")
    sollol = Sollol(Settings.model_validate({"state_dir": tmp_path, "nodes": ["127.0.0.1:9"]}))
    with pytest.raises(SystemExit) as ended:
        await sollol.running()
    await sollol.done()
    assert ended.value.code == 1
    assert len(told(caplog)) == 1


async def test_a_loop_tells_of_a_callback_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    counts: list[str] = []
    defects.listen(counts.append)
    called = asyncio.Event()

    def broken() -> None:
        called.set()
        raise ZeroDivisionError("a defect")

    asyncio.get_running_loop().call_soon(broken)
    await called.wait()
    assert counts == [defects.CALLBACK] and len(told(caplog)) == 1
