"""The fleet of a trace: simulated nodes and their agents, and what befalls them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from tests.fakes.fake_agent import FakeAgent
from tests.fakes.faults import named
from tests.fakes.ollama_node import FakeOllama
from tests.sim.hardware import MODELS, machines
from tests.sim.trace import Event, Trace


def machines_of(trace: Trace, time_scale: float = 1.0) -> list[dict[str, Any]]:
    """Return the machines of a trace's fleet, as keywords of :class:`FakeOllama`."""
    kinds = trace.kinds
    if trace.equal:
        return [dict(spec) for spec in machines(kinds[:1], trace.seed, time_scale) for _ in kinds]
    return machines(kinds, trace.seed, time_scale)


async def warm(trace: Trace, nodes: Iterable[FakeOllama]) -> None:
    """Load what a trace finds loaded."""
    for node in nodes:
        for model in trace.warm:
            node.scheduler.release(await node.scheduler.acquire(model, model.name, {}, None))
            node.scheduler.loads.clear()


async def befall(event: Event, node: FakeOllama) -> None:
    """Let an event happen to its node."""
    spec = node.spec
    if event.what == "slow":
        spec.slow_factor = event.factor
    elif event.what == "fail_fast":
        node.fail(*(named("runner_stopped", path=path, times=None) for path in ("/api/chat", "/api/embed")))
    elif event.what == "join":
        await node.accept_again()
    else:
        if spec.gpu_lost != (event.what == "lose_gpu"):
            spec.gpu_lost = event.what == "lose_gpu"
            for blob in list(node.scheduler.runners):
                node.scheduler.expire(blob)
        if event.what == "recover":
            spec.slow_factor = 1.0
            node.heal()


class SimFleet:
    """A trace's nodes and agents as real HTTP servers in this process."""

    def __init__(self, trace: Trace, time_scale: float = 0.1) -> None:
        self.trace, self.time_scale = trace, time_scale
        self.nodes = [FakeOllama(MODELS, keep_records=0, **spec) for spec in machines_of(trace, time_scale)]
        self.agents = [FakeAgent(node) for node in self.nodes]

    async def start(self) -> Self:
        """Listen on loopback; who joins late has a port that refuses until then."""
        for index, (node, agent) in enumerate(zip(self.nodes, self.agents, strict=True)):
            await node.start()
            await agent.start()
            if index in self.trace.late:
                await node.refuse()
        await warm(self.trace, self.nodes)
        return self

    async def befall(self, event: Event) -> None:
        """Let an event happen."""
        await befall(event, self.nodes[event.node])

    async def stop(self) -> None:
        """Close everything."""
        for agent in self.agents:
            await agent.stop()
        for node in self.nodes:
            await node.stop()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
