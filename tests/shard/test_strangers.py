"""Agents that a coordinator meets and that are none of its fleet: they cost it nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent import join
from shard.models import DEMO_MODEL
from tests.e2e.processes import free_ports
from tests.shard.conftest import BOUND_S, wait_until


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[str]:
    """An agent, as HOST:PORT, that is a member of another fleet and lends memory there."""
    [port] = free_ports(1)
    join.init_fleet(tmp_path / "other", "other")
    command = [sys.executable, "-m", "agent", "--no-mdns", "--state-dir", str(tmp_path / "other")]
    places = ["--listen", f"127.0.0.1:{port}", "--tunnel", "127.0.0.1:0", "--memory", "4GiB"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, *places], stderr=log)
    try:
        wait_until(lambda: lends(port), "the agent lends memory")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(BOUND_S)


def lends(port: int) -> bool:
    try:
        report = httpx.get(f"http://127.0.0.1:{port}/v1/report", trust_env=False).json()
    except httpx.HTTPError:
        return False
    return bool(report.get("rpc", {}).get("devices"))


def plan(state: Path, gguf: Path, *more: str) -> dict[str, object]:
    command = [sys.executable, "-m", "shard", "plan", DEMO_MODEL, "--model", f"{DEMO_MODEL}={gguf}", "--json"]
    ran = subprocess.run(
        [*command, "--no-mdns", "--state-dir", str(state), *more],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )
    assert ran.stdout.startswith("{"), ran.stdout + ran.stderr
    return dict(json.loads(ran.stdout)) | {"status": ran.returncode}


def test_a_member_of_another_fleet_is_left_out_and_the_rest_goes_on(
    stranger: str, tmp_path: Path, gguf_path: Path
) -> None:
    join.init_fleet(tmp_path / "head", "head")
    found = plan(tmp_path / "head", gguf_path, "--agents", stranger)
    assert found["status"] == 0
    assert [share["device"]["host"] for share in found["shares"]] == ["this machine"]  # type: ignore[attr-defined]
    assert "is no member of this fleet" in found["left_out"][stranger]  # type: ignore[index]


def test_a_machine_under_two_names_counts_once(stranger: str, tmp_path: Path, gguf_path: Path) -> None:
    """Named by an address and by a name, or named and announced."""
    port = stranger.rpartition(":")[2]
    found = plan(tmp_path / "other", gguf_path, "--agents", f"{stranger},localhost:{port}", "--memory", "0B")
    shares = found["shares"]
    assert {share["device"]["host"] for share in shares} == {stranger}  # type: ignore[attr-defined]
    assert found["left_out"] == {f"localhost:{port}": f"it is {stranger} under another address"}
