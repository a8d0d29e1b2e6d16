"""Sampling as a whole: whatever stalls or dies, the rest stays fresh and the report says what is old."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from yarl import URL

from agent.gpu import NoGpu, NvidiaGpus
from agent.host import HostReader
from agent.ollama.client import OllamaClient
from agent.report import Host, Report
from agent.sampler import NotReady, Sampler, is_here
from tests.agent.conftest import FakeOllama, model, resident
from tests.agent.nvml_stub import Driver

# Short, where a test waits for it to pass; long enough for a healthy answer on a busy machine.
DEADLINE_S = 0.5


@asynccontextmanager
async def sampling(url: str, **changed: object) -> AsyncIterator[Sampler]:
    """A sampler at work, fast enough that a test sees many rounds."""
    async with OllamaClient(url) as client:
        parts: dict[str, object] = {
            "node_id": "0" * 16,
            "ollama": client,
            "gpus": NoGpu(),
            "host": HostReader(None),
            "every_s": 0.01,
            "slow_s": 0.01,
            "deadline_s": 20.0,
        }
        sampler = Sampler(**(parts | changed))  # type: ignore[arg-type]
        await sampler.first()
        task = asyncio.create_task(sampler.run())
        try:
            yield sampler
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def until(sampler: Sampler, holds: Callable[[Report], bool]) -> Report:
    """Return the first report for which ``holds``; fails if none comes."""
    async with asyncio.timeout(20):
        while not holds(report := sampler.report()):
            await asyncio.sleep(0.005)
    return report


async def test_everything_is_in_the_report(ollama: FakeOllama, driver: Driver) -> None:
    driver.have(2)
    ollama.resident = [resident("gemma3:270m")]
    async with sampling(ollama.url, gpus=NvidiaGpus()) as sampler:
        report = sampler.report(requests_in_flight=3)
    assert report.stale == {}
    assert (report.kind, report.node_id, len(report.gpus)) == ("ollama", "0" * 16, 2)
    assert report.ollama.reachable
    assert report.ollama.error is None
    assert report.ollama.version == "0.33.0"
    assert [row.name for row in report.ollama.models] == ["gemma3:270m", "llama3.2:latest"]
    assert [row.name for row in report.ollama.resident] == ["gemma3:270m"]
    assert report.ollama.requests_in_flight == 3
    assert report.ollama.connections is not None
    assert report.sample_age_s < 20
    assert Report.model_validate_json(report.model_dump_json()) == report


async def test_changes_are_seen(ollama: FakeOllama) -> None:
    async with sampling(ollama.url) as sampler:
        ollama.models = [*ollama.models, model("new:latest")]
        ollama.resident = [resident("new:latest")]
        report = await until(sampler, lambda report: bool(report.ollama.resident))
        report = await until(sampler, lambda report: len(report.ollama.models) == 3)
        assert report.stale == {}
        ollama.models, ollama.resident = [], []
        await until(sampler, lambda report: not report.ollama.resident and not report.ollama.models)


async def test_an_ollama_that_stalls_on_ps_leaves_the_rest_fresh(ollama: FakeOllama) -> None:
    ollama.resident = [resident("gemma3:270m")]
    async with sampling(ollama.url, deadline_s=DEADLINE_S) as sampler:
        ollama.stalled.add("/api/ps")
        ollama.models = [model("new:latest")]
        report = await until(sampler, lambda report: "ollama.resident" in report.stale)
        assert report.stale["ollama.resident"].startswith("no answer within 0.5 s; last read ")
        assert [row.name for row in report.ollama.resident] == ["gemma3:270m"]
        report = await until(sampler, lambda report: report.ollama.models[0].name == "new:latest")
        await until(sampler, lambda report: set(report.stale) == {"ollama.resident"})
        assert report.ollama.reachable
        first = report.sampled_at
        await until(sampler, lambda report: report.sampled_at > first)
        ollama.release()
        await until(sampler, lambda report: report.stale == {})


async def test_an_ollama_that_stops_answering_is_not_reachable(ollama: FakeOllama) -> None:
    async with sampling(ollama.url, deadline_s=DEADLINE_S) as sampler:
        ollama.stalled |= {"/api/ps", "/api/version", "/api/tags"}
        report = await until(sampler, lambda report: not report.ollama.reachable)
        assert report.ollama.error == "no answer within 0.5 s"
        assert len(report.ollama.models) == 2
        ollama.release()
        await until(sampler, lambda report: report.ollama.reachable and report.stale == {})


async def test_an_ollama_that_answers_errors(ollama: FakeOllama) -> None:
    async with sampling(ollama.url) as sampler:
        ollama.failing["/api/tags"] = (500, '{"error":"disk on fire"}')
        report = await until(sampler, lambda report: "ollama.models" in report.stale)
        assert report.stale["ollama.models"].startswith("500: disk on fire; last read ")
        ollama.failing["/api/tags"] = (200, "<html>")
        await until(sampler, lambda report: "not an answer of Ollama" in report.stale["ollama.models"])


async def test_a_new_version_is_noticed_when_ollama_was_away(ollama: FakeOllama) -> None:
    async with sampling(ollama.url) as sampler:
        ollama.failing["/api/ps"] = (502, "restarting")
        await until(sampler, lambda report: "ollama.resident" in report.stale)
        ollama.version = "0.34.0"
        await until(sampler, lambda report: report.ollama.version == "0.34.0")


async def test_the_version_is_not_asked_for_at_every_beat(ollama: FakeOllama) -> None:
    async with sampling(ollama.url):
        async with asyncio.timeout(20):
            while ollama.asked.count("/api/ps") < 20:
                await asyncio.sleep(0.005)
    assert ollama.asked.count("/api/version") == 1


async def test_without_ollama_the_node_is_still_reported() -> None:
    async with sampling("http://127.0.0.1:9") as sampler:
        report = sampler.report()
    assert not report.ollama.reachable
    assert "Connection refused" in (report.ollama.error or "")
    assert set(report.stale) == {"ollama.version", "ollama.models", "ollama.resident"}
    assert report.host.ram_total_bytes > 0


async def test_a_hung_nvml_call_leaves_the_rest_fresh(ollama: FakeOllama, driver: Driver) -> None:
    driver.have(2)
    async with sampling(ollama.url, gpus=NvidiaGpus(), deadline_s=DEADLINE_S) as sampler:
        driver.say(gpu1_hang=1, gpu0_used=7)
        report = await until(sampler, lambda report: "gpus" in report.stale)
        assert report.stale["gpus"].startswith("no answer within 0.5 s; last read ")
        assert [gpu.memory_used_bytes for gpu in report.gpus] == [0, 4 << 30]
        ollama.resident = [resident("gemma3:270m")]
        report = await until(sampler, lambda report: bool(report.ollama.resident))
        await until(sampler, lambda report: set(report.stale) == {"gpus"})
        driver.say(gpu1_hang=0)
        report = await until(sampler, lambda report: report.gpus[0].memory_used_bytes == 7)
        await until(sampler, lambda report: report.stale == {})


async def test_a_lost_gpu_is_named(ollama: FakeOllama, driver: Driver) -> None:
    driver.have(2)
    async with sampling(ollama.url, gpus=NvidiaGpus()) as sampler:
        driver.say(gpu0_error=15, gpu1_used=9)
        report = await until(sampler, lambda report: report.stale == {"gpus.0": "NVML: GPU is lost"})
        report = await until(sampler, lambda report: report.gpus[1].memory_used_bytes == 9)
        assert report.stale == {"gpus.0": "NVML: GPU is lost"}


class BrokenHost(HostReader):
    def __init__(self, good: int) -> None:
        super().__init__(None)
        self._good = good

    def read(self) -> Host:
        self._good -= 1
        if self._good < 0:
            raise OSError("/proc is gone")
        return super().read()


async def test_a_host_that_cannot_be_read_any_more(ollama: FakeOllama) -> None:
    async with sampling(ollama.url, host=BrokenHost(good=1)) as sampler:
        report = await until(sampler, lambda report: "host" in report.stale)
        assert report.stale["host"].startswith("/proc is gone; last read ")


async def test_a_host_that_could_never_be_read(ollama: FakeOllama) -> None:
    async with sampling(ollama.url, host=BrokenHost(good=0)) as sampler:
        with pytest.raises(NotReady, match="there is no sample yet: host: /proc is gone"):
            sampler.report()


async def test_the_loop_is_not_blocked_by_a_hung_driver(ollama: FakeOllama, driver: Driver) -> None:
    driver.have(1)
    driver.say(gpu0_hang=1)
    async with sampling(ollama.url, gpus=NvidiaGpus(), deadline_s=DEADLINE_S) as sampler:
        # There is a first sample although the driver has not answered once.
        report = sampler.report()
        assert report.gpus == []
        assert report.stale["gpus"] == "no answer within 0.5 s; never read"
        await until(sampler, lambda report: report.ollama.reachable and set(report.stale) == {"gpus"})


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:11434", True),
        ("http://127.0.0.53:1", True),
        ("http://[::1]:1", True),
        ("http://203.0.113.7:1", False),
        ("http://gpu1:1", False),
    ],
)
def test_is_here(url: str, here: bool) -> None:
    assert is_here(URL(url)) is here
