"""Who is asked for a report, what is taken for one, and how nodes are called."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from agent import announce, state
from agent.announce import Announced
from agent.report import SCHEMA_VERSION
from shard.agents import FRESH_S, LONGEST_REPORT_BYTES, MOST_ANNOUNCED, Agents, agent_url, name_of
from shard.serve import _announce

Serve = Callable[[Callable[[], web.Response]], Awaitable[str]]


def report(version: int = SCHEMA_VERSION) -> dict[str, object]:
    return {
        "schema_version": version,
        "agent_version": "0.1.0",
        "node_id": "0123456789abcdef",
        "sampled_at": "2026-01-01T00:00:00Z",
        "sample_age_s": 0.1,
        "host": {"hostname": "box", "cpu_count": 2, "ram_total_bytes": 8, "ram_available_bytes": 4},
        "ollama": {"url": "http://127.0.0.1:11434", "reachable": True},
    }


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def start(answer: Callable[[], web.Response]) -> str:
        async def handle(_: web.Request) -> web.Response:
            return answer()

        app = web.Application()
        app.router.add_get("/v1/report", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("10.0.0.2", "10.0.0.2"),
        ("10.0.0.2:11435", "10.0.0.2"),
        ("10.0.0.2:9", "10.0.0.2:9"),
        ("http://box.lan:11435", "box.lan"),
        ("[fd00::2]:7", "[fd00::2]:7"),
    ],
)
def test_nodes_are_called_by_their_agents_address(text: str, name: str) -> None:
    assert name_of(agent_url(text)) == name


@pytest.mark.parametrize("text", ["", "https://10.0.0.2", "http://"])
def test_what_names_no_agent_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="named by HOST:PORT"):
        agent_url(text)


async def test_a_report_is_kept_and_grows_old(serve: Serve) -> None:
    where = await serve(lambda: web.json_response(report()))
    agents = Agents([where])
    await agents.refresh()
    peer = agents[where]
    assert peer.error == "" and peer.here
    assert agents.reports(where)
    assert not agents.reports("nobody:1")
    assert (fresh := peer.fresh(peer.reported_at_s + FRESH_S)) and fresh.host.hostname == "box"
    assert peer.fresh(peer.reported_at_s + FRESH_S + 0.1) is None
    await agents.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: web.json_response(report(SCHEMA_VERSION + 1)), f"version {SCHEMA_VERSION + 1}"),
        (lambda: web.json_response({"hello": "world"}), "no agent"),
        (lambda: web.Response(text="nonsense"), "no agent"),
        (lambda: web.Response(status=503, text="{}"), "503"),
        (lambda: web.Response(body=b" " * (LONGEST_REPORT_BYTES + 1)), "longer than"),
    ],
)
async def test_what_is_no_report_is_said_and_the_last_one_stays(
    serve: Serve, answer: Callable[[], web.Response], why: str
) -> None:
    now: list[Callable[[], web.Response]] = [lambda: web.json_response(report())]
    where = await serve(lambda: now[0]())
    agents = Agents([where])
    await agents.refresh()
    now[0] = answer
    await agents.refresh()
    assert why in agents[where].error
    assert agents[where].report is not None
    assert not agents.reports(where)
    await agents.close()


async def test_nobody_there_is_said(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"127.0.0.1:{free.getsockname()[1]}"
    agents = Agents([where])
    await agents.start()
    assert "refused" in agents[where].error
    await agents.close()


async def test_those_who_are_left_out_are_not_asked(serve: Serve) -> None:
    asked: list[str] = []

    def answer(name: str) -> Callable[[], web.Response]:
        def handle() -> web.Response:
            asked.append(name)
            return web.json_response(report())

        return handle

    first, second = await serve(answer("first")), await serve(answer("second"))
    agents = Agents([first, second])
    await agents.refresh(but={first: "it failed lately"})
    assert asked == ["second"]
    await agents.close()


async def test_announced_agents_come_and_go_and_coordinators_are_none() -> None:
    agents = Agents(["10.9.0.2"])

    def announce(node_id: str, address: str, kind: str = "ollama") -> None:
        agents._on_announcement(node_id, Announced(node_id, kind, (address,), 11435, 11434, "0.1.0"))

    announce("a", "10.9.0.2")  # named already
    announce("b", "10.9.0.3")
    announce("c", "10.9.0.4", kind="shard")
    assert [peer.name for peer in agents] == ["10.9.0.2", "10.9.0.3"]
    agents._on_announcement("a", None)
    agents._on_announcement("b", None)
    assert [peer.name for peer in agents] == ["10.9.0.2"]
    await agents.close()


async def test_an_announced_agent_that_has_moved_is_asked_where_it_is_and_lies_are_bounded() -> None:
    agents = Agents()

    def announce(node_id: str, *addresses: str, port: int = 11435) -> None:
        agents._on_announcement(node_id, Announced(node_id, "ollama", addresses, port, 11434, "0.1.0"))

    announce("a", "10.9.0.2", "fd00::2")
    announce("a", "fd00::2", "10.9.0.2")  # the same place
    assert [peer.name for peer in agents] == ["10.9.0.2"]
    announce("a", "10.9.0.3")
    assert [peer.name for peer in agents] == ["10.9.0.3"]
    announce("a", "10.9.0.3", port=9)
    assert [peer.name for peer in agents] == ["10.9.0.3:9"]
    announce("a", "fe80::3%eth0")  # where nobody reaches it
    assert list(agents) == []
    for number in range(MOST_ANNOUNCED + 5):
        announce(f"liar {number}", f"10.8.{number // 256}.{number % 256}")
    assert len(list(agents)) == MOST_ANNOUNCED
    await agents.close()
    await asyncio.sleep(0)


async def test_an_agent_and_a_coordinator_of_one_machine_announce_themselves_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go by the id of one state directory; who looks for agents finds the agent, proxies find both."""
    node_id = state.node_id(tmp_path)
    loopback = functools.partial(announce.announced, interfaces=["127.0.0.1"])
    monkeypatch.setattr("shard.serve.announced", loopback)
    monkeypatch.setattr("shard.serve.announceable", lambda hosts: ["10.9.0.2"])
    monkeypatch.setattr(announce, "browse", functools.partial(announce.browse, interfaces=["127.0.0.1"]))
    heard: dict[str, Announced | None] = {}
    news = asyncio.Event()

    def hear(announced_id: str, node: Announced | None) -> None:
        if announced_id.startswith(node_id):  # and not another test's
            heard[announced_id] = node
            news.set()

    agents = Agents(mdns=True)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(agents.close)
        await stack.enter_async_context(announce.browse(hear))
        await agents.start()
        await stack.enter_async_context(
            loopback(node_id=node_id, kind="ollama", addresses=["10.9.0.2"], agent_port=11435, ollama_port=1)
        )
        await _announce(stack, node_id, "0.0.0.0", 11436)
        async with asyncio.timeout(30):
            while len(heard) < 2 or "10.9.0.2" not in [peer.name for peer in agents]:
                news.clear()
                await asyncio.wait({asyncio.ensure_future(news.wait())}, timeout=0.5)
        assert {each.kind: each.agent_port for each in heard.values() if each} == {
            "ollama": 11435,
            "shard": 11436,
        }
        assert "10.9.0.2" in [peer.name for peer in agents]
        assert "10.9.0.2:11436" not in [peer.name for peer in agents]
