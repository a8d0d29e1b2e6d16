"""The node's id over restarts, and what systemd hears."""

import asyncio
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import state
from agent.notify import keep_watchdog_fed, notify, watchdog_period_s


def test_the_id_is_random_and_kept(tmp_path: Path) -> None:
    first = state.node_id(tmp_path / "a")
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert state.node_id(tmp_path / "a") == first
    assert state.node_id(tmp_path / "b") != first
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["node_id"]


def test_an_id_that_another_agent_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_too_late(source: Path, target: Path) -> None:
        target.write_text("0123456789abcdef\n")
        link(source, target)

    monkeypatch.setattr("agent.state.os.link", link_too_late)
    assert state.node_id(tmp_path) == "0123456789abcdef"


def test_a_file_that_holds_no_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node_id").write_text("")
    with pytest.raises(ValueError, match="does not hold a node id"):
        state.node_id(tmp_path)


def test_state_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert state.state_dir() == Path("/s/sollol")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert state.state_dir() == Path("/h/.local/state/sollol")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(20)
        yield listening


@pytest.mark.parametrize("address", ["{dir}/notify", "@sollol-test-{pid}"])
def test_notify(
    address: str, manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address.format(dir=tmp_path, pid=os.getpid())
    manager.bind(address.replace("@", "\0"))
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_notify_without_a_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


def test_watchdog_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_period_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_period_s() == 15
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_period_s() == 15
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_period_s() is None


async def test_the_watchdog_is_fed_again_and_again(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "10000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    task = asyncio.create_task(keep_watchdog_fed())
    for _ in range(3):
        assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_watchdog_that_nobody_wants_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await keep_watchdog_fed()
