"""One llama-server whose layers lie on several machines: its leases, and the watch over all of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Mapping

import aiohttp
import orjson
import psutil

from agent.lease import Lease
from agent.report import ShardPlan
from shard.hang import Pulse, hung, pulse
from shard.llama_server import Launch, LlamaServer
from shard.survey import Place

log = logging.getLogger(__name__)

WATCH_S = 1.0
#: A stream that has brought something so lately needs no look at the slots.
LIVELY_S = 2.0
SLOTS_ANSWER_S = 2.0
#: After llama-server has died, how long to wait for a lease to say whose fault it was: agents tell an exit
#: at once and anything else within a few of their status lines.
INQUEST_S = 4.0


class ShardedServer(LlamaServer):
    """A :class:`LlamaServer` with leases. Whoever loses one kills it: it could only hang."""

    def __init__(
        self,
        launch: Launch,
        process: asyncio.subprocess.Process,
        directory: tempfile.TemporaryDirectory[str],
        started: float,
    ) -> None:
        super().__init__(launch, process, directory, started)
        self.plan: ShardPlan | None = None
        self.leases: dict[Place, Lease] = {}
        self.culprit: tuple[str, str] | None = None  #: (node, reason): who made it end
        self._asked_to_end = False
        self._inquiry: asyncio.Task[None] | None = None
        self.loading = True
        self._watches: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()

    def adopt(self, plan: ShardPlan, leases: Mapping[Place, Lease]) -> None:
        """Take over ``leases``; from now on they end with this server, and it with any of them."""
        self.plan, self.plan_id, self.leases = plan, plan.id, dict(leases)
        self._watches = [asyncio.create_task(self._watch_pulse(), name="watch for hangs")]
        self._watches += [
            asyncio.create_task(self._watch_lease(node, lease), name=f"watch the lease of {node}")
            for (node, _), lease in self.leases.items()
        ]

    async def inquest(self) -> tuple[str, str] | None:
        """Return who made it end and why, as far as a lease tells within :data:`INQUEST_S`.

        None at once where it was asked to end.
        """
        if self._inquiry is None:
            self._inquiry = asyncio.create_task(self._inquire(), name="who ended it")
        await asyncio.shield(self._inquiry)
        return self.culprit

    async def _inquire(self) -> None:
        if self.culprit is None and self.leases and not self._asked_to_end:
            lost = {lease.lost: node for (node, _), lease in self.leases.items()}
            done, _ = await asyncio.wait(lost, timeout=INQUEST_S, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                self.culprit = (lost[future], future.result())

    def received_bytes(self) -> int:
        """Return how many bytes the rpc-servers were sent; where no tunnel counts them, what they hold."""
        total = 0
        for lease in self.leases.values():
            if not lease.direct:
                total += lease.received_bytes
            elif lease.latest is not None:
                total += lease.latest.memory_bytes
        return total

    async def stop(self) -> None:
        """End llama-server, then the rpc-servers; safe to call twice."""
        self._asked_to_end = self._asked_to_end or not self.exited.done()
        # A lease that is given back tells nothing any more, and llama-server may well end before it does.
        await self.inquest()
        for watch in self._watches:
            watch.cancel()
        await super().stop()
        closing = {lease: asyncio.create_task(lease.close()) for lease in self.leases.values()}
        # An agent that is gone confirms nothing: it ends its rpc-server by itself, and nobody waits for it.
        present = [task for lease, task in closing.items() if not lease.lost.done()]
        self._closing |= set(closing.values())
        await asyncio.gather(*present)

    async def _watch_lease(self, node: str, lease: Lease) -> None:
        reason = await asyncio.shield(lease.lost)
        if self.culprit is None:
            self.culprit = (node, reason)
        log.warning("%s: %s lost: %s", self.launch.alias, node, reason)
        self.fail(f"{node}: {reason}")

    async def _watch_pulse(self) -> None:
        seen: list[Pulse] = []
        while True:
            await asyncio.sleep(WATCH_S)
            quiet_s = time.monotonic() - self.heard_at_s
            if self.loading or not self.requests or quiet_s < LIVELY_S:
                seen.clear()
                continue
            if (now := await self._pulse()) is None:
                continue
            seen.append(now)
            ms_per_token = self.plan.ms_per_token if self.plan else 0.0
            if reason := hung(seen, ms_per_token):
                log.warning("%s hangs: %s", self.launch.alias, reason)
                self.fail(reason)
                return

    async def _pulse(self) -> Pulse | None:
        try:
            timeout = aiohttp.ClientTimeout(total=SLOTS_ANSWER_S)
            async with self.http.get("/slots", timeout=timeout) as response:
                slots = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
            return None
        return pulse(time.monotonic(), slots, self.received_bytes(), self._cpu_s())

    def _cpu_s(self) -> float:
        own = 0.0
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            own = times.user + times.system
        for lease in self.leases.values():
            own += lease.latest.cpu_s if lease.latest else 0.0
        return own
