"""The whole way: a client, the proxy, the coordinator, two machines; and the coordinator's own death."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard.models import DEMO_MODEL
from tests.lab import Lab, needs_lab
from tests.shard.conftest import wait_until
from tests.shard.fleet import ShardFleet
from tests.shard.test_survival import PROMPT, SLOW_LINK_BIT_S, Asked

pytestmark = [needs_lab, pytest.mark.timeout(300)]

PROXY_PORT = 11434
SOLLOL = Path(sys.executable).with_name("sollol")


class Fronted(ShardFleet):
    """A fleet that is asked through a proxy on the coordinator's host."""

    front = ""

    @property
    def url(self) -> str:
        return self.front or super().url

    def start_proxy(self) -> None:
        host = self.coordinator.host.address
        config = self.coordinator.state / "sollol.yaml"
        config.write_text(
            f"listen: {host}:{PROXY_PORT}\nnodes: [{{host: {host}, port: 11436, kind: shard}}]\n"
            "discovery: {mdns: false, ollama_host: false}\n"
        )
        with (self.coordinator.state / "proxy.log").open("ab") as log:
            self.coordinator.host.popen(
                [SOLLOL, "proxy", "--config", str(config)],
                stdout=log, stderr=log, env=self.coordinator.environment(),
            )  # fmt: skip
        self.front = f"http://{host}:{PROXY_PORT}"
        wait_until(
            lambda: self.answers() and self.http_get(f"{self.front}/api/tags")["models"],
            "the proxy has models",
        )

    def sollol(self, *arguments: str) -> str:
        """A command that asks the proxy."""
        ran = self.coordinator.host.run(
            [SOLLOL, *arguments, "--url", self.front],
            capture_output=True, text=True, env=self.coordinator.environment() | {"COLUMNS": "120"},
        )  # fmt: skip
        return str(ran.stdout)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, gguf_path: Path) -> Iterator[Fronted]:
    with Lab("coordinator", "anna", "bert") as lab:
        made = Fronted(lab, tmp_path_factory.mktemp("fleet"), gguf_path, ["anna", "bert"], lends="240MiB")
        made.start()
        made.start_proxy()
        yield made


def coordinators_report(fleet: Fronted) -> dict[str, object]:
    return dict(fleet.http_get(f"http://{fleet.coordinator.host.address}:11436/v1/report"))


def test_an_answer_names_the_plan_that_served_it(fleet: Fronted) -> None:
    answer = fleet.ask("/api/generate", prompt=PROMPT, raw=True, stream=False, options={"num_predict": 4})
    assert answer.status_code == 200 and answer.json()["done"]
    plan = answer.headers["x-sollol-shard-plan"]
    told = fleet.sollol("explain", answer.headers["x-sollol-request-id"])
    assert plan in told and "10.231.0.2" in told and "10.231.0.3" in told


def test_status_shows_what_lies_where(fleet: Fronted) -> None:
    fleet.generate(PROMPT)
    wait_until(lambda: f"{DEMO_MODEL} ready" in fleet.sollol("status", "--once"), "status shows the model")
    shown = fleet.sollol("status", "--once")
    assert "layers" in shown and "10.231.0.2" in shown and "10.231.0.3" in shown


def test_the_coordinator_dies_with_a_request_that_has_sent_nothing(fleet: Fronted) -> None:
    expected = fleet.generate(PROMPT)["response"]
    assert fleet.ask("/api/generate", keep_alive=0, stream=False).status_code == 200
    fleet.coordinator.host.link(rate_bit_s=SLOW_LINK_BIT_S)
    try:
        asked = Asked(fleet)
        wait_until(lambda: loading(fleet), "the load is under way")
        assert fleet.process is not None
        fleet.process.kill()
        fleet.process.wait()
    finally:
        fleet.coordinator.host.link()
    fleet.serve()  # as systemd would
    assert asked.response() == expected


def loading(fleet: Fronted) -> bool:
    loads = coordinators_report(fleet)["shard"]["loads"]  # type: ignore[index]
    return any(0.05 < load["progress"] < 0.9 for load in loads if load["phase"] == "loading")


def test_the_coordinator_dies_in_mid_stream(fleet: Fronted) -> None:
    fleet.generate(PROMPT)
    options = {"temperature": 0, "num_predict": 3000}
    with fleet.stream("/api/generate", prompt="1, 2, 3,", raw=True, options=options) as lines:
        seen = [next(lines) for _ in range(3)]
        assert fleet.process is not None
        fleet.process.kill()
        fleet.process.wait()
        seen += list(lines)
    assert "error" in seen[-1] and not any(line.get("done") for line in seen), json.dumps(seen[-1])
    fleet.serve()
    assert fleet.generate(PROMPT)["done"]
