"""What the proxy answers about itself: exact JSON, and clear words for what it does not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from mitmproxy import http
from mitmproxy.test import tflow

from proxy_addon.admin import Admin
from proxy_addon.admission.admission import Admission
from proxy_addon.admission.waiter import Waiter
from proxy_addon.ask import Ask
from proxy_addon.dispatch import Dispatch
from proxy_addon.fleet.node import Fleet
from proxy_addon.journal import Journal
from proxy_addon.placement.decision import Decision
from proxy_addon.reload import Reloader
from proxy_addon.settings import Settings
from proxy_addon.telemetry import Telemetry
from tests.proxy.test_telemetry import KEY, NOW_S, chat, fleet, record

__all__ = ["fleet"]  # the fixture


@dataclass
class StandIn:
    """What Admin reads of Dispatch."""

    settings: Settings
    admission: Admission

    def now(self) -> float:
        return NOW_S


def no_decision(waiter: Waiter, closed: object) -> Decision:
    raise AssertionError("nothing is decided here")


@pytest.fixture
def admin(fleet: Fleet, tmp_path: Path) -> Iterator[Admin]:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    admission = Admission(fleet, Settings().admission, no_decision, lambda *_: None, lambda: NOW_S)
    telemetry.depth = admission.line.depth
    reloader = Reloader(Settings(), lambda _: None)
    yield Admin(fleet, Journal(tmp_path), telemetry, cast(Dispatch, StandIn(Settings(), admission)), reloader)


def ask(admin: Admin, path: str, method: str = "GET") -> http.Response | None:
    flow = tflow.tflow()
    flow.request = http.Request.make(method, f"http://x{path}")
    admin.request(flow)
    return flow.response


def read(admin: Admin, path: str, status: int = 200) -> Any:
    response = ask(admin, path)
    assert response is not None
    assert response.status_code == status
    return orjson.loads(response.content or b"")


def test_the_dashboard_is_the_seed_s(admin: Admin) -> None:
    admin.telemetry.observe(record())
    admin.telemetry.observe(record("failed", last="broken"))
    assert read(admin, "/api/dashboard") == {
        "status": "degraded",
        "total_hosts": 2,
        "available_hosts": 1,
        "total_requests": 2,
        "avg_latency_ms": 1500.0,
        "success_rate": 0.25,
        "queue_depth": 0,
        "hosts": [
            {
                "host": "a:1",
                "available": True,
                "latency_ms": 1500.0,
                "success_rate": 0.5,
                "gpu_free_mem": 15625,
                "current_load": 0.3,
                "requests_handled": 1,
            },
            {
                "host": "b:1",
                "available": False,
                "latency_ms": 0.0,
                "success_rate": 0.0,
                "gpu_free_mem": 0,
                "current_load": 0.0,
                "requests_handled": 0,
            },
        ],
    }


def test_the_dashboard_of_an_idle_fleet_has_the_same_types(admin: Admin) -> None:
    idle = read(admin, "/api/dashboard")
    assert (idle["total_requests"], idle["avg_latency_ms"], idle["success_rate"]) == (0, 0.0, 1.0)
    assert isinstance(idle["avg_latency_ms"], float)


def test_status_and_nodes(admin: Admin) -> None:
    admin.fleet.nodes["b:1"].poll_error = "connection refused"
    status = read(admin, "/sollol/status")
    assert (status["status"], status["policy"], status["in_flight"]) == ("degraded", "finish_time", 0)
    rows = {row["name"]: row for row in status["nodes"]}
    assert (rows["a:1"]["state"], rows["a:1"]["models"], rows["a:1"]["poll_age_s"]) == ("up", 1, 1.0)
    assert (rows["b:1"]["state"], rows["b:1"]["why"]) == ("down", "connection refused")
    nodes = read(admin, "/sollol/nodes")["nodes"]
    assert nodes[0]["models"] == [{"name": "gemma3:latest", "size": 1, "digest": "d" * 64}]
    assert nodes[0]["gpus"][0]["memory_free_bytes"] == 16_000_000_000


def let_wait(admin: Admin, **priorities: int) -> None:
    """Requests by these names stand in line behind four seconds of work, each for three seconds."""
    admin.fleet.nodes["a:1"].take(Ask(chat(), key=KEY), NOW_S, 4.0, service_s=4.0)
    for name, priority in priorities.items():
        ask = Ask(chat(), model="gemma3", key=KEY, client="10.0.0.9", priority=priority)
        waiter = Waiter(id=name, ask=ask, client=ask.client, priority=priority, cost_s=2.0, arrived_s=NOW_S)
        waiter.joined_s = NOW_S - 3
        admin.dispatch.admission.line.add(waiter, NOW_S)


def test_the_queue_names_who_waits_and_never_a_prompt(admin: Admin) -> None:
    let_wait(admin, x=5, y=10)
    first, second = read(admin, "/sollol/queue")["queue"]
    assert first == {
        "id": "y",
        "client": "10.0.0.9",
        "model": "gemma3:latest",
        "priority": 10,
        "position": 1,
        "waited_s": 3.0,
        "expected_wait_s": 4.0,
    }
    assert (second["id"], second["position"], second["expected_wait_s"]) == ("x", 2, 6.0)


def test_the_states_of_a_node(admin: Admin) -> None:
    node = admin.fleet.nodes["a:1"]

    def state() -> tuple[str, str | None]:
        row = read(admin, "/sollol/nodes")["nodes"][0]
        return row["state"], row["why"]

    node.full_until_s = NOW_S + 1
    assert state()[0] == "full"
    node.health.failed(NOW_S, "reset", fatal=True)
    assert state() == ("ejected", "reset; again in 2 s")
    node.health.ejected_until_s = node.full_until_s = 0.0
    assert state() == ("returning", "1 at a time")
    node.leaving = True
    assert state()[0] == "leaving"
    node.leaving, node.polled_s = False, None
    assert state()[0] == "new"


def test_health_for_a_balancer(admin: Admin) -> None:
    assert read(admin, "/sollol/healthz") == {"status": "degraded"}
    admin.fleet.nodes["b:1"].poll_error = None
    admin.fleet.nodes["b:1"].polled_s = NOW_S
    assert read(admin, "/sollol/healthz") == {"status": "healthy"}
    for node in admin.fleet:
        node.poll_error = "refused"
    assert read(admin, "/sollol/healthz", 503) == {"status": "unhealthy"}


async def test_decisions_and_their_explanation(admin: Admin) -> None:
    for name in "abc":
        made = record()
        made.id = name
        admin.journal.add(made)
    assert [made["id"] for made in read(admin, "/sollol/decisions")["requests"]] == ["c", "b", "a"]
    assert [made["id"] for made in read(admin, "/sollol/decisions?limit=1")["requests"]] == ["c"]
    assert read(admin, "/sollol/explain/b")["id"] == "b"
    assert read(admin, "/sollol/explain/none", 404) == {"error": "no request 'none' is in the journal"}
    await admin.journal.close()


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "", "9999999999999"])
def test_a_limit_that_makes_no_sense(admin: Admin, limit: str) -> None:
    assert "limit should be 1 to 1000" in read(admin, f"/sollol/decisions?limit={limit}", 400)["error"]


def test_metrics(admin: Admin) -> None:
    admin.telemetry.observe(record())
    response = ask(admin, "/metrics")
    assert response is not None
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert b"sollol_requests_total{" in (response.content or b"")


def test_what_is_not_there_and_what_cannot_be_done(admin: Admin) -> None:
    assert read(admin, "/sollol/nothing", 404)["error"].startswith(
        "there is no /sollol/nothing; there are /metrics"
    )
    response = ask(admin, "/sollol/status", "POST")
    assert response is not None
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


def test_a_head_is_that_of_the_get(admin: Admin) -> None:
    head, get = ask(admin, "/sollol/status", "HEAD"), ask(admin, "/sollol/status")
    assert head is not None
    assert get is not None
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


def test_ollama_s_own_paths_pass(admin: Admin) -> None:
    assert ask(admin, "/api/tags") is None
    assert ask(admin, "/sollolx") is None


def test_what_was_refused_stays_refused(admin: Admin) -> None:
    flow = tflow.tflow()
    flow.request = http.Request.make("GET", "http://x/metrics")
    flow.response = http.Response.make(403)
    admin.request(flow)
    assert flow.response.status_code == 403


def test_sizes_and_times_are_json(admin: Admin) -> None:
    from agent.report import Resident

    admin.fleet.nodes["a:1"].resident[KEY] = Resident(
        name="gemma3:latest",
        size=10,
        size_vram=5,
        expires_at=datetime(2026, 8, 1, tzinfo=UTC),
        context_length=4096,
    )
    assert read(admin, "/sollol/status")["nodes"][0]["resident"] == [
        {
            "name": "gemma3:latest",
            "size": 10,
            "size_vram": 5,
            "expires_at": "2026-08-01T00:00:00Z",
            "context_length": 4096,
        }
    ]
