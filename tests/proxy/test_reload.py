"""Settings read anew by a real proxy process: all or nothing, for requests that come from then on."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy_addon.admission.line import Item, Line
from proxy_addon.reload import changed, told, with_fixed
from proxy_addon.settings import Settings
from tests.fakes.fixtures import NodeFactory
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.processes import Proxy, kill, launch, proxy

PROMPT = "[[id:reload]] [[n:10]]"


def write(config: Path, **settings: Any) -> None:
    """Put a new file in the place of the old one, as editors do."""
    new = config.with_suffix(".new")
    new.write_text(json.dumps(settings))  # JSON is YAML
    new.replace(config)


async def status(session: aiohttp.ClientSession, running: Proxy) -> dict[str, Any]:
    async with session.get(f"{running.url}/sollol/status") as response:
        found: dict[str, Any] = await response.json()
        return found


def tree(**settings: Any) -> Settings:
    return Settings.model_validate(settings)


def test_what_has_changed_is_named_and_what_cannot_change_stays() -> None:
    old = tree(nodes="10.0.0.1", timeouts={"connect_s": 1}, listen="127.0.0.1:1", agent_token="a")
    new = tree(nodes="10.0.0.2", timeouts={"connect_s": 3}, listen="127.0.0.1:2", agent_token="b", workers=2)
    kept, names = with_fixed(old, new)
    assert (str(kept.listen), kept.workers, names) == ("127.0.0.1:1", 1, ["listen", "workers"])
    assert list(changed(old, kept)) == ["nodes", "timeouts.connect_s", "agent_token"]
    result, said = told(["nodes"], names)
    assert result == "applied"
    assert said == "settings read, changed: nodes; listen, workers cannot change before a restart"
    assert told([], []) == ("unchanged", "settings read, nothing has changed")


def test_who_waits_is_not_overtaken_for_another_ageing() -> None:
    line: Line[Item] = Line(30)
    first, second = (Item(client=name, arrived_s=at_s) for name, at_s in (("a", 1e6), ("b", 1e6 + 1)))
    line.add(first, first.arrived_s)
    line.reage(60)
    line.add(second, second.arrived_s)
    assert [item.client for item in line.order(1e6 + 2)] == ["a", "b"]


async def test_a_node_is_added_and_one_drains(ollama_node: NodeFactory, tmp_path: Path) -> None:
    old, new = await ollama_node(), await ollama_node()
    write(config := tmp_path / "sollol.yaml", nodes=[old.host_port])
    async with (
        proxy(tmp_path, "--config", str(config)) as running,
        aiohttp.ClientSession() as session,
    ):
        old.hold_tokens()
        streaming = asyncio.create_task(ask(session, running.url, BY_NAME["chat"], PROMPT))
        await old.wait_received(1, path="/api/chat")
        write(config, nodes=[new.host_port])
        running.process.send_signal(signal.SIGHUP)
        await running.said("changed: nodes")
        await new.wait_received(1, path="/api/tags")  # found at once
        heard = await ask(session, running.url, BY_NAME["chat"], PROMPT)
        assert heard.ended and len(new.requests("/api/chat")) == 1
        old.go_on()
        assert (await streaming).ended  # its last request has come to its end
        await running.said(f"{old.host_port} is no longer part of the fleet")
        assert len(old.requests("/api/chat")) == 1
        last = (await status(session, running))["reload"]
        assert (last["result"], last["said"]) == ("applied", "settings read, changed: nodes")


@pytest.mark.skipif(sys.platform != "linux", reason="files are followed by inotify")
async def test_a_changed_file_is_enough(ollama_node: NodeFactory, tmp_path: Path) -> None:
    old, new = await ollama_node(), await ollama_node()
    config = tmp_path / "conf" / "sollol.yaml"
    config.parent.mkdir()
    write(config, nodes=[old.host_port])
    async with proxy(tmp_path / "state", "--config", str(config)) as running:
        write(config, nodes=[old.host_port, new.host_port])
        await running.said("changed: nodes")
        config.write_text(json.dumps({"nodes": [new.host_port]}))  # in place
        await running.said(f"{old.host_port} is no longer part of the fleet")


async def test_a_mistake_leaves_all_as_it_is(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    write(config := tmp_path / "sollol.yaml", nodes=[node.host_port])
    async with (
        proxy(tmp_path, "--config", str(config)) as running,
        aiohttp.ClientSession() as session,
    ):
        # The good change beside the bad one is not taken over either.
        write(config, nodes=[node.host_port], guard={"body_limit_bytes": 1}, timeouts={"connect_s": -1})
        running.process.send_signal(signal.SIGHUP)
        sentence = f"ettings not taken over: {config}:1: timeouts.connect_s should be greater than 0, not -1"
        await running.said(sentence)
        assert (await ask(session, running.url, BY_NAME["chat"], PROMPT)).ended
        last = (await status(session, running))["reload"]
        assert last["result"] == "refused" and sentence in last["said"]
        async with session.get(f"{running.url}/metrics") as response:
            metrics = await response.text()
        assert "sollol_config_last_reload_successful 0.0" in metrics
        assert 'sollol_config_reloads_total{result="refused"} 1.0' in metrics


async def test_what_needs_a_restart_is_named(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    write(config := tmp_path / "sollol.yaml", nodes=[node.host_port])
    async with (
        proxy(tmp_path, "--config", str(config)) as running,
        aiohttp.ClientSession() as session,
    ):
        write(config, nodes=[node.host_port], workers=3, guard={"body_limit_bytes": 1})
        await running.said("changed: guard.body_limit_bytes; workers cannot change before a restart")
        assert (await ask(session, running.url, BY_NAME["chat"], PROMPT)).status == 413


async def test_a_request_is_served_under_the_settings_that_it_came_in_under(
    ollama_node: NodeFactory, tmp_path: Path
) -> None:
    node = await ollama_node()
    write(config := tmp_path / "sollol.yaml", nodes=[node.host_port])
    async with (
        proxy(tmp_path, "--config", str(config)) as running,
        aiohttp.ClientSession() as session,
    ):
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> Any:
            begun.set()
            yield b'{"model": "llama3.2", '
            await go_on.wait()
            yield b'"prompt": "[[id:slow]] [[n:3]]", "stream": false}'

        posting = asyncio.create_task(session.post(f"{running.url}/api/generate", data=slowly()))
        await begun.wait()
        async with session.get(f"{running.url}/sollol/healthz") as response:  # its head is in by now
            assert response.status == 200
        write(config, nodes=[node.host_port], routing_metadata="body", guard={"body_limit_bytes": 70})
        running.process.send_signal(signal.SIGHUP)
        await running.said("changed: routing_metadata, guard.body_limit_bytes")
        go_on.set()
        async with await posting as response:
            assert response.status == 200 and "_sollol_routing" not in await response.json()
        body = {"model": "llama3.2", "prompt": "[[n:3]]", "stream": False}
        async with session.post(f"{running.url}/api/generate", json=body) as response:
            assert "_sollol_routing" in await response.json()
        async with session.post(f"{running.url}/api/generate", json=body | {"system": "-" * 70}) as response:
            assert response.status == 413


async def test_nohup_stays_nohup(ollama_node: NodeFactory, tmp_path: Path) -> None:
    node = await ollama_node()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by what is started now
    try:
        running = await launch(tmp_path, "--nodes", node.host_port)
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        await running.started()
        # Asked of the kernel: that no reading has begun yet would not say that none will.
        assert signal.SIGHUP in ignored(running.process.pid)
        assert signal.SIGTERM not in ignored(running.process.pid)
        running.process.send_signal(signal.SIGHUP)
        async with aiohttp.ClientSession() as session:
            assert (await status(session, running))["pid"] == running.process.pid
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0
    finally:
        await kill(running)


def ignored(pid: int) -> set[int]:
    """The signals that a process ignores."""
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}
