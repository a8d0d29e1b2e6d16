"""The metrics as a scraper reads them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.report import Gpu, Host, Model, Ollama, Report, Resident
from proxy_addon.admission.waiter import Waiter
from proxy_addon.ask import Ask
from proxy_addon.chain import Sollol
from proxy_addon.endpoints import Endpoint, match
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.decision import Decision
from proxy_addon.record import Attempt, FinalStats, Record
from proxy_addon.settings import Settings
from proxy_addon.telemetry import Telemetry, quantile

NOW_S = 50.0
KEY = "registry.ollama.ai/library/gemma3:latest"


def chat() -> Endpoint:
    endpoint = match("/api/chat")
    assert endpoint is not None
    return endpoint


def report(*free_bytes: int) -> Report:
    gpus = [
        Gpu(
            index=i,
            name="X",
            vendor="nvidia",
            memory_total_bytes=10**10,
            memory_free_bytes=free,
            memory_used_bytes=0,
        )
        for i, free in enumerate(free_bytes)
    ]
    host = Host(
        hostname="a", cpu_count=8, cpu_utilisation=0.3, ram_total_bytes=10**10, ram_available_bytes=10**9
    )
    ollama = Ollama(url="http://localhost:11434", reachable=True)
    return Report(
        agent_version="0",
        node_id="x",
        sampled_at=datetime.now(UTC),
        sample_age_s=0,
        host=host,
        gpus=gpus,
        ollama=ollama,
    )


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    a, b = fleet.add(Node("a", 1)), fleet.add(Node("b", 1))
    a.polled_s = 49.0
    a.models[KEY] = Model(name="gemma3:latest", modified_at=datetime.now(UTC), size=1, digest="d" * 64)
    a.report = report(16_000_000_000, 384_000_000)
    b.poll_error = "refused"
    return fleet


def record(outcome: str = "ok", key: str = KEY, last: str = "ok") -> Record:
    made = Record("id", "native", 10.0, "", chat())
    made.ask = Ask(chat(), "x", key)
    made.decisions = [Decision("finish_time", "b:1", (), ""), Decision("finish_time", "a:1", (), "")]
    made.attempts = [Attempt("b:1", 10.0, 10.5, "died"), Attempt("a:1", 10.5, 12.0, last)]
    made.first_byte_s, made.ended_s, made.outcome = 11.0, 12.0, outcome
    made.stats = FinalStats(prompt_tokens=5, output_tokens=7)
    return made


def samples(telemetry: Telemetry, accept: str = "") -> dict[str, float]:
    text, _ = telemetry.expose(accept)
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_the_seed_s_names(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    telemetry.observe(record())
    telemetry.observe(record("failed", last="broken"))
    seen = samples(telemetry)
    assert seen["sollol_requests_total|a:1|gemma3:latest|success"] == 1
    assert seen["sollol_requests_total|a:1|gemma3:latest|failure"] == 1
    assert seen["sollol_latency_seconds|a:1|0.5"] == 1.5
    assert seen["sollol_latency_seconds|a:1|0.99"] == 1.5
    assert seen["sollol_latency_seconds_count|a:1"] == 1
    assert seen["sollol_queue_depth|5"] == 0
    assert seen["sollol_node_health|a:1"] == 1.0
    assert seen["sollol_node_health|b:1"] == 0.0
    assert seen["sollol_gpu_memory_free_bytes|a:1"] == 16_384_000_000
    assert "sollol_gpu_memory_free_bytes|b:1" not in seen


def test_the_conventional_ones(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    fleet.nodes["a:1"].take(Ask(chat(), key=KEY), 1.0, 1.0)
    telemetry.observe(record())
    telemetry.retried("died")
    telemetry.hook_failed("request")
    seen = samples(telemetry)
    assert seen["sollol_request_duration_seconds_sum|a:1"] == 2.0
    assert seen["sollol_request_duration_seconds_bucket|a:1|1.0"] == 0
    assert seen["sollol_request_duration_seconds_bucket|a:1|2.5"] == 1
    assert seen["sollol_time_to_first_byte_seconds_sum|a:1"] == 1.0
    assert seen["sollol_requests_in_flight|a:1"] == 1
    assert seen["sollol_retries_total|died"] == 1
    assert seen["sollol_decisions_total|b:1|finish_time"] == 1
    assert seen["sollol_tokens_total|a:1|output|gemma3:latest"] == 7
    assert seen["sollol_tokens_total|a:1|prompt|gemma3:latest"] == 5
    assert seen["sollol_hook_errors_total|request"] == 1
    assert any(name.startswith("sollol_build_info|") for name in seen)


async def test_tries_of_doubtful_nodes_are_counted(tmp_path: Path) -> None:
    proxy = Sollol(Settings(state_dir=tmp_path))
    proxy.prober.outcomes["better"] += 2
    assert samples(proxy.telemetry)["sollol_probes_total|better"] == 2


def test_what_a_node_with_gpus_leaves_to_its_cpu(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    whole = Resident(name="whole:latest", size=10, size_vram=10)
    for node in fleet:
        node.resident = {"whole": whole, KEY: Resident(name="gemma3:latest", size=10, size_vram=6)}
    name = "sollol_offloaded_bytes"

    def rows() -> dict[str, float]:
        return {key: value for key, value in samples(telemetry).items() if key.startswith(name)}

    assert rows() == {f"{name}|a:1|gemma3:latest": 4}  # no agent tells whether b has GPUs
    fleet.nodes["b:1"].report = report()
    assert rows() == {f"{name}|a:1|gemma3:latest": 4}  # it has none
    fleet.nodes["a:1"].resident = {"whole": whole}
    assert rows() == {}


def test_names_that_clients_make_up_are_one_label(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    for number in range(50):
        telemetry.observe(record("refused", key=f"made-up-{number}"))
    assert [name for name in samples(telemetry) if name.startswith("sollol_requests_total")] == [
        "sollol_requests_total|a:1|other|refused"
    ]


def test_a_request_that_reached_no_node(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    lonely = record("failed")
    lonely.attempts, lonely.decisions = [], [Decision("score", None, (), "nobody")]
    telemetry.observe(lonely)
    telemetry.observe(Record("id", "native", 10.0, "", None, ended_s=11.0, outcome="ok"))  # /metrics itself
    seen = samples(telemetry)
    assert seen["sollol_requests_total|none|gemma3:latest|failure"] == 1
    assert seen["sollol_decisions_total|none|score"] == 1
    assert sum(value for name, value in seen.items() if name.startswith("sollol_requests_total")) == 1
    assert telemetry.finished == 0


def test_a_node_s_tally_counts_its_own_failures_only(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    telemetry.observe(record())
    for neutral in ("client_left", "full"):
        telemetry.observe(record("client_left", last=neutral))
    assert telemetry.tallies["a:1"].success_rate() == 1.0
    assert telemetry.tallies["a:1"].served == 1
    assert (telemetry.tallies["b:1"].served, telemetry.tallies["b:1"].failed) == (0, 3)


def test_a_scraper_that_wants_openmetrics_gets_it(fleet: Fleet) -> None:
    text, content_type = Telemetry(fleet, lambda: NOW_S).expose("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_two_proxies_do_not_count_into_each_other(fleet: Fleet) -> None:
    one, two = Telemetry(fleet, lambda: NOW_S), Telemetry(fleet, lambda: NOW_S)
    one.retried("died")
    assert "sollol_retries_total|died" not in samples(two)


def test_quantiles_by_nearest_rank() -> None:
    values = [float(n) for n in range(100)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([3.0], 0.99)) == (50.0, 99.0, 3.0)


def test_the_line_is_counted_by_priority_when_somebody_looks(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    assert [samples(telemetry)[f"sollol_queue_depth|{priority}"] for priority in range(1, 11)] == [0] * 10
    telemetry.depth = lambda: Counter({1: 2, 8: 1})
    seen = samples(telemetry)
    assert (seen["sollol_queue_depth|1"], seen["sollol_queue_depth|8"], seen["sollol_queue_depth|5"]) == (
        2,
        1,
        0,
    )


def test_waits_and_refusals(fleet: Fleet) -> None:
    telemetry = Telemetry(fleet, lambda: NOW_S)
    waited = record()
    assert waited.ask is not None
    waited.waiter = Waiter(id="id", ask=waited.ask, arrived_s=10.0)
    waited.queued_s = 2.0
    telemetry.observe(waited)
    telemetry.refused("rate")
    seen = samples(telemetry)
    assert seen["sollol_queue_wait_seconds_sum|5"] == 2.0
    assert (seen["sollol_queue_wait_seconds_bucket|1.0|5"], seen["sollol_queue_wait_seconds_count|5"]) == (
        0,
        1,
    )
    assert seen["sollol_admission_refused_total|rate"] == 1
