"""``sollol shard plan`` against real agents: the picture, the reasons, and where it would be better."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shard.models import DEMO_MODEL
from tests.lab import Lab, needs_lab
from tests.shard.conftest import wait_until
from tests.shard.fleet import AGENT_PORT, PLAIN, ShardFleet

pytestmark = [needs_lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, gguf_path: Path) -> Iterator[ShardFleet]:
    """Beside the agent of anna there is an Ollama (here: one of ours) that has the model too."""
    with Lab("coordinator", "anna", "bert") as lab:
        made = ShardFleet(lab, tmp_path_factory.mktemp("fleet"), gguf_path, ["anna", "bert"], lends="300MiB")
        anna = made.workers["anna"]
        anna.start(
            "shard", "serve", "--listen", "127.0.0.1:11434", "--model", f"{DEMO_MODEL}={gguf_path}",
            "--state-dir", str(anna.state / "ollama"), "--no-mdns",
        )  # fmt: skip
        made.start()
        # Between anna and bert there is no such distance.
        made.coordinator.host.link(delay_ms=20)
        wait_until(lambda: has_the_model(made), "anna's agent sees its Ollama's model")
        yield made


def has_the_model(fleet: ShardFleet) -> bool:
    with fleet.coordinator.host.entered():
        url = f"http://{fleet.workers['anna'].host.address}:{AGENT_PORT}/v1/report"
        return bool(httpx.get(url, **PLAIN).json()["ollama"]["models"])


def plan(fleet: ShardFleet, *arguments: str, agents: str | None = None, status: int = 0) -> str:
    named = agents or ",".join(worker.host.address for worker in fleet.workers.values())
    ran = fleet.coordinator.host.run(
        [
            sys.executable, "-m", "shard", "plan", *arguments, "--agents", named, "--memory", "0B",
            "--no-mdns",
            "--model", f"{DEMO_MODEL}={fleet.gguf}",
            "--state-dir", str(fleet.coordinator.state),
        ],
        capture_output=True, text=True, check=False, env=fleet.coordinator.environment() | {"COLUMNS": "100"},
    )  # fmt: skip
    assert ran.returncode == status, ran.stdout + ran.stderr
    return str(ran.stdout)


def test_it_shows_which_layers_lie_where_and_that_another_machine_would_do_better(fleet: ShardFleet) -> None:
    shown = plan(fleet, DEMO_MODEL)
    assert "10.231.0.2" in shown or "10.231.0.3" in shown
    assert re.search(r"[\d.]+ tokens/s expected", shown)
    # Anna would have her own layers without a link.
    assert "Better on 10.231.0.2, which has the model too" in shown


def test_as_json_it_has_every_share(fleet: ShardFleet) -> None:
    told = json.loads(plan(fleet, DEMO_MODEL, "--json"))
    assert told["fits"] is True
    assert sum(share["layers"] for share in told["shares"]) == 18
    assert [share["output"] for share in told["shares"]].index(True) == len(told["shares"]) - 1


def test_too_big_it_says_by_how_much(fleet: ShardFleet) -> None:
    anna = fleet.workers["anna"].host.address
    shown = plan(fleet, DEMO_MODEL, "--ctx", "32768", agents=anna, status=1)
    assert re.search(r"Too big by \d+(\.\d+)? MiB: it needs", shown)


def test_who_is_left_out_and_why(fleet: ShardFleet) -> None:
    agents = ",".join([*(worker.host.address for worker in fleet.workers.values()), "10.231.0.9"])
    shown = plan(fleet, DEMO_MODEL, agents=agents)
    assert "10.231.0.9" in shown


def test_an_unknown_model_is_a_sentence(fleet: ShardFleet) -> None:
    assert plan(fleet, "nobody:1b", status=1) == ""
