"""The real proxy in the test's own event loop, on an ephemeral loopback port, over given nodes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from mitmproxy import ctx

from proxy_addon.launcher import LeanMaster
from proxy_addon.settings import Settings

#: Quick polls and limits, so that a test of a hung node takes a second.
FAST: dict[str, Any] = {
    "poll": {"interval_s": 0.1, "timeout_s": 0.4, "failures_to_lose": 2},
    "discovery": {"mdns": False, "ollama_host": False, "localhost": False},
    "retry": {"backoff_s": 0.02, "backoff_max_s": 0.1},
}


def with_slots(node: Any, parallel: int) -> dict[str, Any]:
    """The setting of a fake node whose slots the proxy is told, as it cannot know them."""
    host, _, port = node.host_port.rpartition(":")
    return {"host": host, "port": int(port), "parallel": parallel}


class RunningProxy:
    """``async with RunningProxy([node, …], timeouts={…}) as proxy: proxy.url``."""

    def __init__(self, nodes: Iterable[Any], **settings: Any) -> None:
        self._state = tempfile.TemporaryDirectory(prefix="sollol-test-")
        merged = {**FAST, **settings}
        for key in FAST.keys() & settings.keys():
            if isinstance(FAST[key], dict):
                merged[key] = {**FAST[key], **settings[key]}
        self.settings = Settings.model_validate(
            {
                "listen": "127.0.0.1:0",
                "state_dir": Path(self._state.name),
                "nodes": [getattr(node, "host_port", node) for node in nodes],
                **merged,
            }
        )
        self.master: LeanMaster

    async def __aenter__(self) -> Self:
        self.master = LeanMaster(self.settings)
        self._run = asyncio.create_task(self.master.run())
        started = asyncio.create_task(self._started())
        done, _ = await asyncio.wait({self._run, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._run in done:
            started.cancel()
            await self._run
        return self

    async def _started(self) -> None:
        server = self.master.addons.get("proxyserver")
        while not server.listen_addrs() or not self.sollol.ready.is_set():
            await asyncio.sleep(0.005)

    async def __aexit__(self, *_: object) -> None:
        self.master.shutdown()
        await self._run
        server = ctx.master.addons.get("proxyserver")
        await server.servers.update([])
        for handler in list(server.connections.values()):
            for io in list(handler.transports.values()):
                if io.handler is not None:
                    io.handler.cancel("test over")
        self._state.cleanup()

    @property
    def sollol(self) -> Any:
        return self.master.sollol

    @property
    def port(self) -> int:
        return int(self.master.addons.get("proxyserver").listen_addrs()[0][1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"
