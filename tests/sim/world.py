"""A trace played in virtual time: the fakes' own schedulers, in this process, under a balancer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proxy_addon.record import FinalStats
from tests.fakes.clock import clock_s
from tests.fakes.engine import ApiError, Generation, Job, Stats, count_tokens, keep_alive_s
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.native_api import ANSWER_TURN, embed_texts, find, prompt_of
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.scheduler import Busy, LoadFailed
from tests.sim import virtual
from tests.sim.fleet import befall, machines_of, warm
from tests.sim.hardware import MODELS
from tests.sim.trace import PAUSE_S, Arrival, Event, Trace

TOKEN_BATCH = 8  #: tokens at a time: a finer grain costs processor time and changes no figure by a percent
LIMIT_S = 4 * 3600.0  #: of virtual time: what is not answered by then never will be


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that brought no answer: what a proxy sees of it."""

    status: int | None  #: None: refused
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. Times count from its sending."""

    arrival: Arrival
    node: int | None
    ttft_s: float
    total_s: float
    tokens: int
    failed: bool
    attempts: int = 1


@dataclass(eq=False, slots=True)
class Request:
    """A request on its way."""

    arrival: Arrival
    sent_s: float
    node: int = -1
    placed_s: float = 0.0
    first_s: float | None = None
    attempts: int = 0
    work: asyncio.Task[FinalStats | Failure] | None = None  #: the attempt under way
    taken_back: str | None = None  #: why the balancer has ended it

    def take_back(self, reason: str) -> None:
        """End the attempt as a client's leaving would: it has then failed, for ``reason``."""
        assert self.work is not None and self.first_s is None
        self.taken_back = reason
        self.work.cancel()


class Balancer(Protocol):
    """Whoever chooses nodes."""

    def start(self, world: World) -> None:
        """The world begins; nodes that join late do not answer yet."""

    async def place(self, request: Request) -> int | None:
        """Choose a node; None where nobody can serve it."""

    def first_token(self, request: Request) -> None:
        """The answer begins."""

    def ended(self, request: Request, stats: FinalStats) -> None:
        """The answer is complete."""

    async def failed(self, request: Request, failure: Failure) -> int | None:
        """An attempt failed: choose another node, or None where the client must see it."""


class SimNode(FakeOllama):
    """A node that is called instead of connected to."""

    def __init__(self, index: int, machine: dict[str, object]) -> None:
        super().__init__(MODELS, keep_records=0, **machine)
        self.spec.token_batch = TOKEN_BATCH
        self.index = index
        self.reachable = True

    @property
    def host_port(self) -> str:
        """An address that nobody connects to."""
        return f"10.0.0.{self.index + 1}:11434"

    @property
    def listening(self) -> bool:
        """Whether calls are answered."""
        return self.reachable

    async def accept_again(self) -> None:
        """Answer calls from now on."""
        self.reachable = True

    async def serve(self, request: Request, balancer: Balancer) -> FinalStats | Failure:
        """Do a request's work."""
        arrival = request.arrival
        if not self.reachable:
            return Failure(None, "connection refused")
        fault = self.server.claim("POST", arrival.path)
        if fault is not None:
            return Failure(fault.status, fault.text)
        try:
            if arrival.texts:
                return await self._embed(request, balancer)
            return await self._chat(request, balancer)
        except (Busy, LoadFailed, ApiError) as problem:
            status = {Busy: 503, LoadFailed: 500}.get(type(problem), 400)
            return Failure(status, str(problem))

    async def _embed(self, request: Request, balancer: Balancer) -> FinalStats:
        began_s, arrival = clock_s(), request.arrival
        model, texts = find(self, arrival.model), list(arrival.texts)
        _, load_ns = await embed_texts(self, model, arrival.model, texts, arrival.body())
        tokens = sum(map(count_tokens, texts))
        request.first_s = clock_s()
        balancer.first_token(request)
        return FinalStats(prompt_tokens=tokens, load_s=load_ns / 1e9, total_s=clock_s() - began_s)

    async def _chat(self, request: Request, balancer: Balancer) -> FinalStats:
        arrival = request.arrival
        job = Job(
            find(self, arrival.model),
            arrival.model,
            prompt_of(arrival.messages),
            arrival.options,
            keep_alive_s(None),
            arrival.num_predict,
            answer_turn=ANSWER_TURN,
        )
        async with Generation(self.scheduler, job) as generation:
            async for _ in generation.pieces():
                if request.first_s is None:
                    request.first_s = clock_s()
                    balancer.first_token(request)
            return final_stats(generation.stats)


def final_stats(stats: Stats) -> FinalStats:
    """Return a node's statistics as the proxy reads them from the last object of an answer."""
    fields = stats.fields()
    return FinalStats(
        prompt_tokens=fields["prompt_eval_count"],
        output_tokens=fields["eval_count"],
        load_s=fields["load_duration"] / 1e9,
        prefill_s=fields["prompt_eval_duration"] / 1e9,
        decode_s=fields["eval_duration"] / 1e9,
        total_s=fields["total_duration"] / 1e9,
        done_reason=stats.done_reason,
    )


@dataclass
class Result:
    """A trace under a balancer."""

    trace: Trace
    balancer: str
    outcomes: list[Outcome]
    loads: int
    duration_s: float  #: until the last answer
    busy_s: list[float] = field(default_factory=list)  #: by node: the time it worked on anything


class World:
    """The nodes of a trace, and the trace itself as it unfolds."""

    def __init__(self, trace: Trace, balancer: Balancer) -> None:
        self.trace, self.balancer = trace, balancer
        self.nodes = [SimNode(index, machine) for index, machine in enumerate(machines_of(trace))]
        self.agents = [FakeAgent(node) for node in self.nodes]
        for index in trace.late:
            self.nodes[index].reachable = False
        self.start_s = 0.0  #: of the trace, on the loop's clock: the nodes have loaded what they had loaded
        self._ended: dict[str, asyncio.Event] = {arrival.id: asyncio.Event() for arrival in trace.arrivals}
        self._work: list[list[tuple[float, float]]] = [[] for _ in self.nodes]

    async def play(self) -> list[Outcome]:
        """Return what became of every request."""
        for node in self.nodes:
            node.scheduler.start()
        await warm(self.trace, self.nodes)
        self.start_s = clock_s()
        self.balancer.start(self)
        tasks = [asyncio.create_task(self._befall(event)) for event in self.trace.events]
        try:
            async with asyncio.timeout(LIMIT_S):
                return list(await asyncio.gather(*(self._request(a) for a in self.trace.arrivals)))
        finally:
            for task in tasks:
                task.cancel()
            for node in self.nodes:
                await node.scheduler.stop()

    async def _befall(self, event: Event) -> None:
        await self._until(event.at_s)
        await befall(event, self.nodes[event.node])

    async def _request(self, arrival: Arrival) -> Outcome:
        await self._until(arrival.at_s)
        if arrival.after is not None and not self._ended[arrival.after].is_set():
            await self._ended[arrival.after].wait()
            await asyncio.sleep(PAUSE_S)
        request = Request(arrival, clock_s())
        try:
            return await self._serve(request)
        finally:
            self._ended[arrival.id].set()

    async def _serve(self, request: Request) -> Outcome:
        index = await self.balancer.place(request)
        while index is not None:
            request.node, request.placed_s = index, clock_s()
            request.attempts += 1
            found = await self._attempt(request, self.nodes[index])
            self._work[index].append((request.placed_s, clock_s()))
            if isinstance(found, FinalStats):
                self.balancer.ended(request, found)
                return self._outcome(request, index, found.output_tokens or 0)
            index = await self.balancer.failed(request, found)
        return self._outcome(request, None, 0, failed=True)

    async def _attempt(self, request: Request, node: SimNode) -> FinalStats | Failure:
        request.work = asyncio.create_task(node.serve(request, self.balancer))
        try:
            return await request.work
        except asyncio.CancelledError:
            if request.taken_back is None:
                raise
            reason, request.taken_back = request.taken_back, None
            return Failure(None, reason)
        finally:
            request.work.cancel()  # where it is this that was cancelled

    def _outcome(self, request: Request, node: int | None, tokens: int, *, failed: bool = False) -> Outcome:
        total_s = clock_s() - request.sent_s
        first_s = total_s if request.first_s is None else request.first_s - request.sent_s
        return Outcome(request.arrival, node, first_s, total_s, tokens, failed, request.attempts)

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self.start_s + at_s - clock_s()))

    @property
    def loads(self) -> int:
        """How often any model was loaded."""
        return sum(len(node.scheduler.loads) for node in self.nodes)

    def busy_s(self) -> list[float]:
        """Return for how long each node had something to do."""
        return [_covered(spans) for spans in self._work]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    covered_s, until_s = 0.0, 0.0
    for begin_s, end_s in sorted(spans):
        covered_s += max(0.0, end_s - max(begin_s, until_s))
        until_s = max(until_s, end_s)
    return covered_s


async def _play(trace: Trace, balancer: Balancer, name: str) -> Result:
    world = World(trace, balancer)
    outcomes = await world.play()
    return Result(trace, name, outcomes, world.loads, clock_s() - world.start_s, world.busy_s())


def play(trace: Trace, balancer: Balancer, name: str = "") -> Result:
    """Play a trace in virtual time."""
    return virtual.run(_play(trace, balancer, name))
