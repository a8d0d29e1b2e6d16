"""The real proxy over the nodes of many cells, which run at once.

Each cell has a node of its own that fails, and a model of its own that this node holds; the healthy node
holds it too, unless the cell is run without one. Nodes are polled once, before anything fails: whatever the
proxy knows of a failure it knows from the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tests.fakes.ollama_node import FakeModel, FakeOllama
from tests.matrix import asking, check, faulty
from tests.matrix.cells import Cell, Exchange, What
from tests.matrix.client import Client, Seen
from tests.matrix.expectation import Sees
from tests.matrix.runs import Run, runs
from tests.proxy.running import RunningProxy

LIMIT_S = 60.0  #: within which every request must end, on a slow machine too
WAITS_S = 1.0  #: how long nothing is waited for, where that is what the client must see
LARGE_AT_ONCE = 3  #: cells with large bodies, of which each is in memory several times
SMALL = Exchange("native", True, "small")

#: What is noticed by a limit alone.
TIMED = {What.BLACK_HOLE, What.NEVER_READ, What.SILENCE, What.HALF_HEAD_SILENCE}
SHORT = {
    "connect_s": 0.5,
    "first_byte_s": 3.0,
    "whole_answer_s": 3.0,
    "idle_s": 3.0,
}  # a healthy node keeps them
LONG = {"connect_s": LIMIT_S, "first_byte_s": LIMIT_S, "whole_answer_s": LIMIT_S, "idle_s": LIMIT_S}
SETTINGS: dict[str, Any] = {
    "poll": {"interval_s": 600, "timeout_s": 5},
    "placement": "round_robin",  # equals take turns: the faulty node of a cell, the first one, has its turn
    "retry": {"rounds": 2, "backoff_s": 0.02, "backoff_max_s": 0.1, "budget_min_per_s": 1000},
    "admission": {"max_queue": 10_000},
}


@dataclass(eq=False)
class Case:
    """A run, with the node that fails in it."""

    run: Run
    number: int
    node: FakeOllama

    @property
    def cell(self) -> Cell:
        """What fails how."""
        return self.run.cell

    @property
    def model(self) -> str:
        """The model that only this case's nodes hold."""
        return f"model-{self.number}"

    @property
    def tag(self) -> str:
        """What the tokens of the answer are made of."""
        return f"c{self.number}"

    @property
    def source(self) -> str:
        """The client's address: a client's uploads go to one node."""
        return f"127.0.{1 + self.number // 250}.{1 + self.number % 250}"

    @property
    def own_digest(self) -> str:
        """A blob that only this case's node has, which makes it the node of the client's uploads."""
        return f"sha256:{self.number:064x}"


def _node(models: Iterable[str], size: int = 1 << 20) -> FakeOllama:
    return FakeOllama(
        [FakeModel(name, size=size) for name in models],
        vram_bytes=1 << 40,
        max_loaded_models=1000,
        default_num_ctx=4096,
        time_scale=1e-3,
        num_parallel=4,
    )


async def run(cells: Sequence[Cell], splice: bool) -> dict[str, list[str]]:
    """Run ``cells``; what was wrong, by the name of the case, and under ``afterwards``."""
    cases = [Case(each, i, _node([f"model-{i}"])) for i, each in enumerate(runs(cells))]
    healthy = _node(case.model for case in cases if not case.run.alone)
    for node in (*(case.node for case in cases), healthy):
        await node.start()
    for case in cases:  # resident there: no load is waited for
        held = case.node.store.find(case.model)
        assert held is not None
        case.node.scheduler.release(await case.node.scheduler.acquire(held, case.model, {}, None))
        case.node.store.blobs[case.own_digest] = 1
    timed = any(cell.what in TIMED for cell in cells)
    nodes = [*(case.node for case in cases), healthy]
    async with RunningProxy(nodes, splice=splice, timeouts=SHORT if timed else LONG, **SETTINGS) as proxy:
        arena = Arena(proxy.port, healthy)
        found = await asyncio.gather(*(arena.run(case) for case in cases))
        wrong = {str(case.run): each for case, each in zip(cases, found, strict=True) if each}
        if afterwards := await arena.afterwards(nodes):
            wrong["afterwards"] = afterwards
    for node in nodes:
        node.heal()
        await node.stop()
    return wrong


class Arena:
    """The proxy's port and the healthy node."""

    def __init__(self, port: int, healthy: FakeOllama) -> None:
        self._port, self._healthy = port, healthy
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    async def run(self, case: Case) -> list[str]:
        """What is wrong in ``case``."""
        if case.cell.exchange.body == "small":
            return await self._run(case)
        async with self._large:
            return await self._run(case)

    async def _run(self, case: Case) -> list[str]:
        try:
            async with asyncio.timeout(LIMIT_S), Client(self._port, case.source) as client:
                return await self._in_time(case, client)
        except TimeoutError:
            return [f"it has not ended within {LIMIT_S:g} s"]
        finally:
            self._forget_bodies(case)

    async def _in_time(self, case: Case, client: Client) -> list[str]:
        cell, wanted = case.cell, case.run.wanted
        if cell.exchange.upload:
            await client.ask("HEAD", f"/api/blobs/{case.own_digest}")
        gate = asyncio.Event()

        def open_gate(body: bytes) -> None:
            if faulty.seen(cell, body):
                gate.set()

        await faulty.break_down(case.node, cell, gate)
        sent = asking.body(cell.exchange, case.model, case.tag)
        on_body = open_gate if faulty.waits(cell) else None
        asked = client.ask("POST", asking.path(cell.exchange), sent, on_body)
        try:
            seen = await asyncio.wait_for(asked, WAITS_S if wanted.sees is Sees.WAITS else None)
        except TimeoutError:
            seen = Seen()
        received = check.Asked(*(self._received(node, case) for node in (case.node, self._healthy)))
        wrong = list(check.problems(cell, wanted, case.tag, case.node.host_port, seen, received))
        await faulty.heal(case.node, cell)
        if wanted.sees is not Sees.WAITS:
            wrong += await self._next(case, client, seen)
        return wrong

    def _received(self, node: FakeOllama, case: Case) -> int:
        """How often ``node`` was sent the request of ``case``, or began to be."""
        path = asking.path(case.cell.exchange)
        records = node.requests(path, "POST")
        if node is case.node or case.cell.exchange.upload:
            return len(records)
        return sum(record.model == case.model for record in records)

    async def _next(self, case: Case, client: Client, seen: Seen) -> list[str]:
        """What is wrong with the connection after the answer: it serves, or was said to be closed."""
        if not client.reusable:
            closed = seen.headers.get("connection", "").lower() == "close"
            return [] if closed or not seen.ended else ["the connection is of no more use"]
        wrong: list[str] = []
        if not case.run.alone and not case.cell.exchange.upload:
            for turn in "ab":  # on the faulty node's kept connection too, if there is one
                tag = f"{case.tag}.{turn}"
                after = await client.ask("POST", asking.path(SMALL), asking.body(SMALL, case.model, tag))
                wrong += check.next_one(SMALL, tag, after)
                if not client.reusable:
                    return wrong
        after = await client.ask("GET", "/sollol/queue")
        if after.status != 200 or after.problem:
            wrong.append(f"then the proxy answered {after.status} {after.problem}")
        return wrong

    def _forget_bodies(self, case: Case) -> None:
        for record in (*case.node.received, *self._healthy.received):
            if record.model in (None, case.model):
                record.body = b""

    async def afterwards(self, nodes: Iterable[FakeOllama]) -> list[str]:
        """What is left over when all is done."""
        wrong: list[str] = []
        for node in nodes:
            try:
                await node.wait_until(lambda node=node: all(r.finished_s for r in node.received))  # type: ignore[misc]
            except TimeoutError:
                left = [r.path for r in node.received if r.finished_s is None]
                wrong.append(f"{node.host_port} still works on {left}")
        left = ["all"]
        try:
            async with asyncio.timeout(LIMIT_S), Client(self._port) as client:
                while left := await self._in_flight(client):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            wrong.append(f"still in flight: {left}")
        return wrong

    async def _in_flight(self, client: Client) -> list[str]:
        status = orjson.loads((await client.ask("GET", "/sollol/status")).body)
        left = [f"{node['name']}: {node['in_flight']}" for node in status["nodes"] if node["in_flight"]]
        left += [f"queued: {each['model']}" for each in status["queue"]]
        metrics = (await client.ask("GET", "/metrics")).body.decode()
        open_ = float(metrics.partition("\nsollol_requests_open ")[2].partition("\n")[0])
        return left + ([f"{open_ - 1:g} requests are open"] if open_ > 1 else [])  # this one is
