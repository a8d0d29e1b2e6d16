"""Gathers what a report says, part by part, so that no part waits for another.

Every part has a task, a pace and a deadline of its own (:class:`~agent.polled.Polled`). What blocks, NVML
above all, runs in a thread per source, because a driver can hang in a call for minutes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import psutil
from yarl import URL

from agent import __version__, bandwidth
from agent.gpu import GpuSource, Reading
from agent.host import HostReader, connections
from agent.ollama import runners
from agent.ollama.client import OllamaClient, parse_ps, parse_tags
from agent.polled import Polled
from agent.report import Model, NodeKind, Ollama, Report, Resident
from agent.rpc_server import RpcServers
from agent.worker import Worker

# The pace of what is dear to read and changes slowly: Ollama opens every manifest to answer /api/tags, and to
# list connections the kernel walks its whole table (5 ms for one of 262144 buckets).
SLOW_S = 5.0

# While /api/ps answers, the version is only asked for to notice an upgrade.
VERSION_EVERY_S = 30.0

DEADLINE_S = 2.0

# What takes its time but is done rarely: to load a GPU's libraries, to measure.
PATIENCE_S = 60.0


class NotReady(Exception):
    """There is no first sample yet; the text says what is missing."""


class Sampler:
    """Keeps the latest sample of this node. Reading it costs nothing; taking it is :meth:`run`'s work."""

    def __init__(
        self,
        *,
        node_id: str,
        ollama: OllamaClient,
        gpus: GpuSource,
        host: HostReader,
        rpc: RpcServers | None = None,
        memory_bandwidth: Callable[[], float] | None = None,
        kind: NodeKind = "ollama",
        every_s: float = 1.0,
        slow_s: float = SLOW_S,
        deadline_s: float = DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node_id = node_id
        self._kind: NodeKind = kind
        self._ollama = ollama
        self._clock = clock
        self._tags: tuple[bytes, list[Model]] = (b"", [])
        self._ps: tuple[bytes, list[Resident]] = (b"", [])
        self._version_asked_at_s = float("-inf")

        def polled[T](part: str, read: Callable[[], Awaitable[T]], pace_s: float = every_s) -> Polled[T]:
            return Polled(part, read, every_s=pace_s, deadline_s=deadline_s, clock=clock)

        self._host = polled("host", Worker(host.read, "host").call)
        self._gpus = polled("gpus", Worker(gpus.read, "gpus").call)
        self._resident = polled("ollama.resident", self._read_resident)
        self._version = polled("ollama.version", self._read_version)
        self._models = polled("ollama.models", self._read_models, slow_s)
        self._connections: Polled[int | None] | None = None
        self._num_parallel: int | None = None
        self._runners = Worker(runners.num_parallel, "runners").call if is_here(ollama.url) else None
        if is_here(ollama.url):
            count = Worker(partial(connections, ollama.url.port or 80), "connections").call
            self._connections = polled("ollama.connections", count, slow_s)
        self._rpc = rpc
        self._look: Polled[None] | None = None
        if rpc is not None:
            self._look = Polled("rpc", self._look_for_rpc, every_s=slow_s, deadline_s=PATIENCE_S, clock=clock)
        self._bandwidth: Polled[float] | None = None
        if memory_bandwidth is not None:
            self._bandwidth = Polled(
                "host.memory_bandwidth",
                Worker(memory_bandwidth, "bandwidth").call,
                every_s=bandwidth.EVERY_S,
                deadline_s=PATIENCE_S,
                clock=clock,
            )

    @property
    def parts(self) -> tuple[Polled[Any], ...]:
        """Every part that is read, for those who count failures."""
        parts: tuple[Polled[Any] | None, ...] = (
            self._host,
            self._gpus,
            self._resident,
            self._version,
            self._models,
            self._connections,
            self._look,
            self._bandwidth,
        )
        return tuple(part for part in parts if part is not None)

    async def first(self) -> None:
        """Take one sample of everything that is quickly read, each part within its deadline."""
        patient = (self._look, self._bandwidth)
        await asyncio.gather(*(part.refresh() for part in self.parts if part not in patient))

    async def run(self) -> None:
        """Sample until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for part in self.parts:
                tasks.create_task(part.run(), name=f"sample {part.part}")

    def report(self, requests_in_flight: int | None = None) -> Report:
        """Return the latest sample. Raises NotReady before the host was read for the first time."""
        if self._host.value is None:
            raise NotReady(f"there is no sample yet: host: {self._host.error or 'being read'}")
        now_s = self._clock()
        host = self._host.value
        if self._bandwidth is not None:
            host = host.model_copy(update={"memory_bandwidth_bytes_s": self._bandwidth.value})
        reading = self._gpus.value or Reading()
        stale = {part.part: why for part in self.parts if (why := part.staleness(now_s)) is not None}
        read = [part for part in self.parts if part.read_at_s is not None and part.sampled_at is not None]
        newest = max(read, key=lambda part: part.read_at_s or 0.0)
        return Report(
            agent_version=__version__,
            node_id=self._node_id,
            kind=self._kind,
            sampled_at=newest.sampled_at,
            sample_age_s=max(0.0, now_s - (newest.read_at_s or now_s)),
            host=host,
            gpus=list(reading.gpus),
            ollama=Ollama(
                url=str(self._ollama.url),
                reachable=self._version.error is None and self._version.value is not None,
                error=self._version.error,
                version=self._version.value,
                models=self._models.value or [],
                resident=self._resident.value or [],
                connections=self._connections.value if self._connections else None,
                num_parallel=self._num_parallel,
                requests_in_flight=requests_in_flight,
            ),
            rpc=self._rpc.snapshot(host, reading.gpus) if self._rpc is not None else None,
            stale=reading.stale | stale,
        )

    async def _read_version(self) -> str:
        known, now_s = self._version.value, self._clock()
        answering = self._version.error is None and self._resident.error is None
        if known is not None and answering and now_s - self._version_asked_at_s < VERSION_EVERY_S:
            return known
        version = await self._ollama.version()
        self._version_asked_at_s = now_s
        return version

    async def _look_for_rpc(self) -> None:
        assert self._rpc is not None
        await self._rpc.look((self._gpus.value or Reading()).gpus)

    # A body that did not change is not parsed again: 50 models a second would be most of the agent's work.

    async def _read_models(self) -> list[Model]:
        body = await self._ollama.request("GET", "/api/tags")
        if body != self._tags[0]:
            self._tags = body, parse_tags(body)
        return self._tags[1]

    async def _read_resident(self) -> list[Resident]:
        body = await self._ollama.request("GET", "/api/ps")
        if body != self._ps[0]:
            before, resident = self._ps[1], parse_ps(body)
            if self._runners is not None and _names(before) != _names(resident):
                self._num_parallel = await self._runners()
            self._ps = body, resident
        return self._ps[1]


def _names(resident: Iterable[Resident]) -> set[str]:
    return {model.name for model in resident}


def is_here(url: URL) -> bool:
    """Return whether ``url`` names this machine by a loopback or one of its own addresses."""
    host = url.host or ""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return address.is_loopback or str(address) in own
