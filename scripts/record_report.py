"""Record what an agent reports on this machine, serials blanked: ``record_report.py OUT.json``.

For the tests' fixtures. It runs without Ollama and needs aiohttp, pydantic, psutil and, for an NVIDIA GPU,
nvidia-ml-py; with prometheus-client too the report is taken over HTTP, as a proxy takes it.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from agent import gpu
from agent.host import HostReader
from agent.ollama.client import OllamaClient
from agent.ollama.storage import find_store
from agent.sampler import Sampler

# A port where nothing listens.
NO_OLLAMA = "http://127.0.0.1:9"


async def record() -> dict[str, Any]:
    async with OllamaClient(NO_OLLAMA) as ollama:
        sampler = Sampler(
            node_id="0" * 16, ollama=ollama, gpus=gpu.detect(), host=HostReader(find_store()), deadline_s=30
        )
        await sampler.first()  # NVML's first call may take seconds without persistence mode
        await asyncio.sleep(1)
        await sampler.first()
        try:
            from agent.server import make_app
        except ImportError as error:
            print(f"not over HTTP: {error}", file=sys.stderr)
            return dict(json.loads(sampler.report().model_dump_json()))
        return await over_http(make_app(sampler))


async def over_http(app: Any) -> dict[str, Any]:
    import aiohttp
    from aiohttp import web

    async with AsyncExitStack() as stack:
        runner = web.AppRunner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with session.get(f"http://127.0.0.1:{port}/v1/report") as answer:
            answer.raise_for_status()
            return dict(await answer.json())


def blanked(report: dict[str, Any]) -> dict[str, Any]:
    report["node_id"] = "0" * 16
    report["host"]["hostname"] = "blanked"
    for index, found in enumerate(report["gpus"]):
        if found["uuid"] is not None:
            found["uuid"] = f"GPU-{index:08x}-0000-0000-0000-000000000000"
        for process in found["processes"]:
            process["name"] = None if process["name"] is None else "blanked"
    if report["host"]["model_store"]:
        report["host"]["model_store"]["path"] = "/blanked"
    return report


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = blanked(asyncio.run(record()))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(f"wrote {sys.argv[1]}: GPUs {[each['name'] for each in found['gpus']]}, stale {found['stale']}")
