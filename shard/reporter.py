"""What this machine has, and the coordinator's report: an agent's, of kind ``shard``, with its models.

The proxy asks it at the coordinator's own port, as it would ask an agent beside an Ollama.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from agent import __version__, gpu
from agent.gpu import Reading
from agent.host import HostReader
from agent.polled import Polled
from agent.report import Host, Model, NodeKind, Ollama, Report, Resident, Shard
from agent.rpc_server import RpcServers
from agent.sampler import DEADLINE_S, NotReady
from agent.worker import Worker

EVERY_S = 1.0


class LocalMachine:
    """GPUs, memory and load of the machine that the coordinator itself runs on."""

    def __init__(self, node_id: str, *, lends_bytes: int | None = None) -> None:
        self._node_id = node_id
        # Its devices are named as those of an rpc-server here would be: the two are of one build.
        self._rpc = RpcServers(lends_bytes=lends_bytes)
        source = gpu.detect()
        self._host = Polled(
            "host", Worker(HostReader(None).read, "host").call, every_s=EVERY_S, deadline_s=DEADLINE_S
        )
        self._gpus = Polled("gpus", Worker(source.read, "gpus").call, every_s=EVERY_S, deadline_s=DEADLINE_S)

    @property
    def parts(self) -> tuple[Polled[Host], Polled[Reading]]:
        """What is read, for those who count failures."""
        return self._host, self._gpus

    async def first(self) -> None:
        """Read everything once. Raises NotReady where the host cannot be read."""
        await asyncio.gather(*(part.refresh() for part in self.parts))
        self.report()
        await self._rpc.look()

    async def run(self) -> None:
        """Go on reading until cancelled."""
        await asyncio.gather(*(part.run() for part in self.parts))

    def report(self, ollama: Ollama | None = None, kind: NodeKind = "shard") -> Report:
        """Return the latest sample. Raises NotReady before the first."""
        if self._host.value is None:
            raise NotReady(f"there is no sample yet: host: {self._host.error or 'being read'}")
        now_s = time.monotonic()
        reading = self._gpus.value or Reading()
        return Report(
            agent_version=__version__,
            node_id=self._node_id,
            kind=kind,
            sampled_at=self._host.sampled_at or datetime.now(UTC),
            sample_age_s=max(0.0, now_s - (self._host.read_at_s or now_s)),
            host=self._host.value,
            gpus=list(reading.gpus),
            ollama=ollama or Ollama(url="", reachable=False),
            rpc=self._rpc.snapshot(self._host.value, reading.gpus),
            stale=reading.stale
            | {part.part: why for part in self.parts if (why := part.staleness(now_s)) is not None},
        )


class OwnReport:
    """The coordinator as the proxy sees it; ``say`` tells its Ollama part and its shard part."""

    def __init__(self, local: LocalMachine, say: Callable[[], tuple[Ollama, Shard]]) -> None:
        self._local = local
        self._say = say

    @property
    def parts(self) -> Sequence[Polled[Host] | Polled[Reading]]:
        """The polled parts."""
        return self._local.parts

    def report(self, requests_in_flight: int | None = None) -> Report:
        """Return the latest report. Raises NotReady before the first sample."""
        ollama, shard = self._say()
        ollama.requests_in_flight = requests_in_flight
        report = self._local.report(ollama)
        report.shard = shard
        return report


def own_ollama(
    url: str,
    version: str,
    tags: Sequence[dict[str, object]],
    ps: Sequence[dict[str, object]],
    parallel: int,
) -> Ollama:
    """Return this node's own rows of ``/api/tags`` and ``/api/ps`` as its report carries them.

    ``parallel`` is how many requests each model serves at a time.
    """
    return Ollama(
        url=url,
        reachable=True,
        version=version,
        models=[Model.model_validate(row) for row in tags],
        resident=[Resident.model_validate(row) for row in ps],
        num_parallel=parallel,
    )
