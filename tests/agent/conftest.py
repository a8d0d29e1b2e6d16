"""What several tests of the agent need: an NVIDIA driver, and an Ollama that can be made to misbehave."""

import asyncio
import ctypes
import hashlib
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pynvml
import pytest
from aiohttp import web

from tests.agent.nvml_stub import COMPILER, Driver, build
from tests.agent.tunnels import EchoServers, Members, tunnel_server


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C compiler ({COMPILER}) to build the stub of NVIDIA's library with")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """An NVIDIA driver in this very process, for as long as the test lasts.

    Each test loads a copy of its own, and none is unloaded: a thread may still be in it.
    """
    said = tmp_path / "nvml.txt"
    monkeypatch.setenv("SOLLOL_NVML_STUB", str(said))
    own = shutil.copy(nvml_library, tmp_path / "libnvidia-ml-own.so")
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(own)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    yield Driver(said)
    said.unlink(missing_ok=True)  # lets a call that hangs come back


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def servers() -> EchoServers:
    return EchoServers()


@pytest.fixture
async def port(members: Members, servers: EchoServers) -> AsyncIterator[int]:
    async with tunnel_server(members, servers) as port:
        yield port


class FakeOllama:
    """Enough of Ollama for an agent: the three lists it polls, each of which can stall or fail."""

    def __init__(self) -> None:
        self.url = ""
        self.version = "0.33.0"
        self.models = [model("gemma3:270m"), model("llama3.2:latest")]
        self.resident: list[dict[str, object]] = []
        self.asked: list[str] = []
        self.stalled: set[str] = set()
        self.failing: dict[str, tuple[int, str]] = {}
        self._released = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.asked.append(path)
        if path in self.stalled:
            await self._released.wait()
        if path in self.failing:
            status, text = self.failing[path]
            return web.Response(status=status, text=text)
        bodies: dict[str, object] = {
            "/api/version": {"version": self.version},
            "/api/tags": {"models": self.models or None},
            "/api/ps": {"models": self.resident},
        }
        return web.json_response(bodies[path])

    def release(self) -> None:
        self.stalled.clear()
        self._released.set()


def model(name: str) -> dict[str, object]:
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-08-01T10:00:00.123456789+02:00",
        "size": 291_554_930,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": {"family": "gemma3", "quantization_level": "Q8_0", "context_length": 32768},
        "capabilities": ["completion"],
    }


def resident(name: str) -> dict[str, object]:
    kept = {key: value for key, value in model(name).items() if key in ("name", "model", "digest", "details")}
    return kept | {
        "size": 1_000_000_000,
        "size_vram": 600_000_000,
        "expires_at": "2026-08-01T12:05:00.5+02:00",
        "context_length": 4096,
    }


@pytest.fixture
async def ollama() -> AsyncIterator[FakeOllama]:
    fake = FakeOllama()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    fake.release()
    await runner.cleanup()


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()
