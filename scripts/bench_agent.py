"""What an agent costs its node: memory, and share of a CPU core, of a real agent process.

It samples once a second beside a fake Ollama with 50 models, on the test suite's stub of NVIDIA's library
with 4 GPUs where there is a C compiler, and one proxy polls it every second; last, as a member of a fleet,
with its tunnel open. Linux only.

    python scripts/bench_agent.py [SECONDS]
"""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
from aiohttp import web  # noqa: E402

from agent import join  # noqa: E402
from tests.agent.nvml_stub import COMPILER, GIB, Driver, build  # noqa: E402

MODELS = 50
GPUS = 4
RSS_TARGET_MB = 60
CPU_TARGET = 0.01


def model(number: int) -> dict[str, object]:
    name = f"model-{number}:8b"
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "8.0B",
        "quantization_level": "Q4_K_M",
        "context_length": 131072,
        "embedding_length": 4096,
    }
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-08-01T10:00:00.123456789Z",
        "size": 5 * GIB,
        "digest": f"{number:064x}",
        "details": details,
        "capabilities": ["completion", "tools"],
    }


async def fake_ollama(stack: AsyncExitStack) -> str:
    resident = model(0) | {
        "size_vram": 5 * GIB,
        "expires_at": "2030-01-01T00:00:00Z",
        "context_length": 8192,
    }
    bodies: dict[str, object] = {
        "/api/version": {"version": "0.33.0"},
        "/api/tags": {"models": [model(number) for number in range(MODELS)]},
        "/api/ps": {"models": [resident]},
    }

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(bodies[request.path])

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    return await listen(stack, app)


async def listen(stack: AsyncExitStack, app: web.Application) -> str:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


async def measure(
    seconds: float, *, polled: bool, joined: bool, nvml: Path | None
) -> tuple[float, float, float]:
    """Return (RSS in MB, peak RSS in MB, share of a core) of an agent over ``seconds``."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = dict(os.environ)
        if nvml is not None:
            driver = Driver(directory / "nvml.txt")
            driver.have(GPUS)
            driver.say(gpu0_compute=f"{os.getpid()}:{5 * GIB}")
            environment |= {"LD_LIBRARY_PATH": str(nvml.parent), "SOLLOL_NVML_STUB": str(driver.path)}
        if joined:
            join.init_fleet(directory, "bench")
        command = [
            "-m",
            "agent",
            "--tunnel",
            "127.0.0.1:0",
            "--listen",
            "127.0.0.1:0",
            "--no-mdns",
            "--state-dir",
            str(directory),
        ]
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            "--ollama",
            await fake_ollama(stack),
            cwd=ROOT,
            env=environment,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert agent.stderr is not None
            said = b""
            while b" listens on " not in said:
                said = await agent.stderr.readline()
                if not said:
                    sys.exit("the agent did not start")
            url = f"http://{said.decode().rpartition(' ')[2].strip()}/v1/report"
            session = await stack.enter_async_context(aiohttp.ClientSession())
            async with session.get(url) as answer:
                report = await answer.json()
            assert len(report["ollama"]["models"]) == MODELS
            assert len(report["gpus"]) == (GPUS if nvml else 0)
            assert bool(report["rpc"]["tunnel_port"]) == joined
            assert report["stale"] == {}, report["stale"]
            await asyncio.sleep(3)  # past the start
            before_s, begun = cpu_s(agent.pid), time.monotonic()
            while (now := time.monotonic()) < begun + seconds:
                if polled:
                    async with session.get(url) as answer:
                        await answer.read()
                await asyncio.sleep(min(1.0, begun + seconds - now))
            share = (cpu_s(agent.pid) - before_s) / (time.monotonic() - begun)
            return memory_mb(agent.pid, "VmRSS"), memory_mb(agent.pid, "VmHWM"), share
        finally:
            agent.terminate()
            await agent.wait()


async def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as directory:
        nvml = build(Path(directory)) if shutil.which(COMPILER) else None
        gpus = f"{GPUS} GPUs" if nvml else "no GPU"
        print(f"agent, one sample a second, {MODELS} models, {gpus}, {seconds:g} s each")
        for who, polled, joined in (
            ("on its own", False, False),
            ("polled by a proxy", True, False),
            ("with an open tunnel", True, True),
        ):
            rss_mb, peak_mb, share = await measure(seconds, polled=polled, joined=joined, nvml=nvml)
            met = rss_mb <= RSS_TARGET_MB and share <= CPU_TARGET
            print(f"  {who:19} RSS {rss_mb:.1f} MB (peak {peak_mb:.1f}), {share:.2%} of a core: ", end="")
            print("both targets met" if met else f"above {RSS_TARGET_MB} MB or {CPU_TARGET:.0%}")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0))
