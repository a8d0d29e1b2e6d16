"""The agent beside a fake node: the real agent's server over a report drawn from the fake's state.

::

    agent = await FakeAgent(node).start()
    agent.host_port                        # of /v1/report, /metrics, /healthz
    agent.not_ready = "no sample yet"      # then /v1/report is a 503
    agent.changes = {"sample_age_s": 30.0} # fields that override the report's
    await agent.stop()
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Self

from aiohttp import web

from agent import __version__
from agent.in_flight import Shares
from agent.report import Disk, Gpu, Host, Model, Ollama, Report, Resident
from agent.sampler import NotReady
from agent.server import make_app
from tests.fakes.models_api import ps_row, tags_row
from tests.fakes.ollama_node import FakeOllama


class FakeAgent:
    """Reports what a :class:`~tests.fakes.ollama_node.FakeOllama` has loaded, from its first moment on."""

    def __init__(self, node: FakeOllama, *, token: str | None = None) -> None:
        self.node = node
        self.node_id = str(uuid.uuid4())
        self.not_ready: str | None = None
        self.changes: dict[str, Any] = {}
        self.served = 0
        self.shares = Shares()  #: of simulated proxies; real ones connect to the server
        self._token = token
        self._runner: web.AppRunner | None = None
        self._host_port = ""

    @property
    def parts(self) -> Sequence[Any]:
        """The polled parts: none, a fake's report is drawn on demand."""
        return ()

    def report(self, requests_in_flight: int | None = None) -> Report:
        """Return the node's state as an agent would report it; raises NotReady if told so."""
        if self.not_ready is not None:
            raise NotReady(self.not_ready)
        self.served += 1
        node, scheduler, spec = self.node, self.node.scheduler, self.node.spec
        runners = sorted(scheduler.runners.values(), key=lambda r: r.expires_at, reverse=True)
        busy = any(runner.decoding for runner in runners)
        used = spec.vram_bytes - scheduler.vram_free
        share = max(1, spec.gpus)
        gpus = [
            Gpu(
                index=index,
                name="Fake GPU",
                uuid=f"GPU-{uuid.uuid5(uuid.UUID(self.node_id), str(index))}",
                vendor="nvidia",
                memory_total_bytes=spec.vram_bytes // share,
                memory_used_bytes=used // share,
                memory_free_bytes=(spec.vram_bytes - used) // share,
                utilisation=1.0 if busy else 0.0,
                memory_bandwidth_bytes_s=spec.memory_bandwidth_bytes_s,
            )
            for index in range(spec.gpus if spec.vram_bytes else 0)
        ]
        disk = sum(node.store.blobs.values())
        report = Report(
            agent_version=__version__,
            node_id=self.node_id,
            sampled_at=datetime.now(UTC),
            sample_age_s=0.0,
            host=Host(
                hostname=f"fake-{node.server.port}",
                cpu_count=8,
                cpu_utilisation=0.1,
                load_1m=0.5,
                ram_total_bytes=spec.ram_bytes,
                ram_available_bytes=max(0, scheduler.ram_free),
                model_store=Disk(path="/models", total_bytes=1 << 40, free_bytes=max(0, (1 << 40) - disk)),
            ),
            gpus=gpus,
            ollama=Ollama(
                url=node.url,
                reachable=node.listening,
                error=None if node.listening else f"{node.host_port} refused the connection",
                version=node.version,
                models=[Model.model_validate(tags_row(model)) for model in node.store.listing()],
                resident=[Resident.model_validate(ps_row(runner)) for runner in runners],
                connections=len(node.server.connections),
                num_parallel=max((runner.parallel for runner in runners), default=None),
                requests_in_flight=requests_in_flight,
            ),
        )
        return report.model_copy(update=self.changes)

    async def start(self, port: int = 0) -> Self:
        """Serve on loopback and return the agent itself."""
        self._runner = web.AppRunner(make_app(self, token=self._token), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        host, bound = self._runner.addresses[0][:2]
        self._host_port = f"{host}:{bound}"
        return self

    async def stop(self) -> None:
        """Close the server."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def host_port(self) -> str:
        """``127.0.0.1:port``."""
        return self._host_port

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://{self._host_port}"
