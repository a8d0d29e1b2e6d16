"""The HTTP server: the report, who is believed, metrics, health, errors."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from aiohttp import ClientSession, web
from prometheus_client.parser import text_string_to_metric_families

from agent import server
from agent.report import Disk, Gpu, Host, Ollama, Report, Resident
from agent.sampler import NotReady
from agent.server import make_app
from tests.agent.conftest import Clock

GPU = Gpu(
    index=1,
    name="RTX",
    uuid="GPU-1",
    vendor="nvidia",
    memory_total_bytes=100,
    memory_free_bytes=60,
    memory_used_bytes=40,
    power_w=7.5,
)
DARK = GPU.model_copy(update={"index": 0, "power_w": None})


class Reporter:
    """A node of which the test decides what it says."""

    def __init__(self) -> None:
        self.parts = [SimpleNamespace(part="gpus", failures=4)]
        self.age_s = 0.5
        self.fault: Exception | None = None

    def report(self, requests_in_flight: int | None = None) -> Report:
        if self.fault is not None:
            raise self.fault
        return Report(
            agent_version="0.1.0",
            node_id="ab" * 8,
            sampled_at=datetime(2026, 8, 1, tzinfo=UTC),
            sample_age_s=self.age_s,
            host=Host(
                hostname="h",
                cpu_count=8,
                ram_total_bytes=10,
                ram_available_bytes=5,
                model_store=Disk(path="/m", total_bytes=9, free_bytes=3),
            ),
            gpus=[DARK, GPU],
            ollama=Ollama(
                url="http://127.0.0.1:11434",
                reachable=True,
                version="0.33.0",
                resident=[Resident(name="m:latest", size=8, size_vram=6)],
                requests_in_flight=requests_in_flight,
            ),
            stale={"gpus.0": "lost"},
        )


class Agent:
    """A running agent and a caller of it."""

    def __init__(self, session: ClientSession, url: str, reporter: Reporter) -> None:
        self.session, self.url, self.reporter = session, url, reporter

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.get(self.url + path, headers=sent) as answer:
            return answer.status, await answer.text()


type Start = Callable[..., Awaitable[Agent]]


@pytest.fixture
async def start(clock: Clock) -> AsyncIterator[Start]:
    runners = []
    async with ClientSession() as session:

        async def run(token: str | None = None) -> Agent:
            reporter = Reporter()
            runner = web.AppRunner(make_app(reporter, token=token, clock=clock), access_log=None)
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return Agent(session, f"http://127.0.0.1:{runner.addresses[0][1]}", reporter)

        yield run
        for runner in runners:
            await runner.cleanup()


async def test_report(start: Start) -> None:
    agent = await start()
    async with agent.session.get(agent.url + "/v1/report") as answer:
        assert answer.content_type == "application/json"
        assert await answer.json() == json.loads(agent.reporter.report().model_dump_json())


async def test_who_sends_a_token_must_send_the_right_one(start: Start) -> None:
    agent = await start(token="s3cret")
    assert (await agent.get("/v1/report"))[0] == 200
    assert (await agent.get("/v1/report", Authorization="Bearer s3cret"))[0] == 200
    status, text = await agent.get("/v1/report", Authorization="Bearer wrong")
    assert (status, json.loads(text)) == (401, {"error": "the bearer token is not this agent's"})


async def test_metrics_are_the_report(start: Start) -> None:
    agent = await start()
    async with agent.session.ws_connect(agent.url + "/v1/in-flight?proxy=p1") as proxy:
        await proxy.receive()
        await proxy.send_str('{"1": {"path": "/api/chat", "model": "m:latest"}}')
        async with agent.session.ws_connect(agent.url + "/v1/in-flight?proxy=p2") as other:
            while "p1 1" not in (await other.receive()).data:
                pass
        status, text = await agent.get("/metrics")
    assert status == 200
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    gpu0, gpu1 = ((("gpu", n), ("name", "RTX"), ("uuid", "GPU-1")) for n in ("0", "1"))
    assert samples["sollol_agent_gpu_memory_free_bytes", *gpu1] == 60
    assert samples["sollol_agent_gpu_power_watts", *gpu1] == 7.5
    assert ("sollol_agent_gpu_power_watts", *gpu0) not in samples  # unknown is not zero
    assert not any(key[0] == "sollol_agent_gpu_temperature_celsius" for key in samples)
    assert samples["sollol_agent_host_ram_available_bytes",] == 5
    assert samples["sollol_agent_host_model_store_free_bytes",] == 3
    assert samples["sollol_agent_ollama_up",] == 1
    assert samples["sollol_agent_ollama_requests_in_flight",] == 1
    assert samples["sollol_agent_ollama_resident_size_vram_bytes", ("model", "m:latest")] == 6
    assert samples["sollol_agent_stale", ("part", "gpus.0")] == 1
    assert samples["sollol_agent_sample_failures_total", ("part", "gpus")] == 4
    assert samples["process_resident_memory_bytes",] > 0


async def test_metrics_before_the_first_sample(start: Start) -> None:
    agent = await start()
    agent.reporter.fault = NotReady("there is no sample yet")
    status, text = await agent.get("/metrics")
    assert status == 200
    assert "sollol_agent_sample_failures_total" in text
    assert "sollol_agent_ollama_up" not in text


async def test_healthz(start: Start) -> None:
    agent = await start()
    assert await agent.get("/healthz") == (200, '{"status": "ok"}')
    agent.reporter.age_s = 11
    assert await agent.get("/healthz") == (503, '{"error": "the newest sample is 11 s old"}')
    agent.reporter.fault = NotReady("there is no sample yet: host: being read")
    assert await agent.get("/healthz") == (503, '{"error": "there is no sample yet: host: being read"}')
    assert (await agent.get("/v1/report"))[0] == 503


async def test_unknown_path_and_wrong_method(start: Start) -> None:
    agent = await start()
    status, text = await agent.get("/api/tags")
    assert status == 404
    assert json.loads(text) == {
        "error": "there is no /api/tags; this agent has /v1/report, /v1/in-flight, /metrics, /healthz"
    }
    async with agent.session.post(agent.url + "/v1/report", data=b"x") as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET,HEAD"
        assert await answer.json() == {"error": "/v1/report allows GET, HEAD, not POST"}
    async with agent.session.head(agent.url + "/v1/report") as answer:
        assert answer.status == 200
        assert await answer.read() == b""


async def test_a_fault_is_a_clear_error_and_counted(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    agent = await start()
    agent.reporter.fault = RuntimeError("a bug")
    assert await agent.get("/v1/report") == (
        500,
        '{"error": "the agent failed to answer; its log says why"}',
    )
    assert "a bug" in caplog.text
    agent.reporter.fault = None
    assert "sollol_agent_errors_total 1.0" in (await agent.get("/metrics"))[1]


@pytest.mark.parametrize(
    ("remote", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("127.8.9.1", True),
        ("192.168.1.2", False),
        ("fe80::1%eth0", False),
        (None, False),
    ],
)
def test_is_loopback(remote: str | None, loopback: bool) -> None:
    assert server.is_loopback(SimpleNamespace(remote=remote)) is loopback  # type: ignore[arg-type]


async def test_a_web_page_whose_name_was_rebound_reads_nothing(start: Start) -> None:
    """The report names processes, and this machine, where the browser runs, may share."""
    agent = await start()
    assert await agent.get("/v1/report", host="evil.example") == (
        403,
        '{"error": "Host evil.example is not a name of this server"}',
    )
    assert (await agent.get("/v1/report", origin="https://evil.example"))[0] == 403
