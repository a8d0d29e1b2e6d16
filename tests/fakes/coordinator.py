"""A coordinator (``sollol shard serve``) as the proxy sees one: a node that reports for itself.

::

    coordinator = await FakeCoordinator([FakeModel("big", size=40 << 30)]).start()
    coordinator.models["big"] = {"fits": False, "why": "12.0 GiB too big"}   # fields of its ShardModel

What it has loaded is reported as ready under a plan over two nodes, what it loads as loading.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from agent.report import Report, Shard, ShardLoad, ShardModel, ShardPlan, ShardShare
from tests.fakes.exchange import Exchange
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import GIB, FakeModel, short

MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)


class FakeCoordinator(FakeOllama):
    """Fits whatever it has, unless :attr:`models` says otherwise."""

    def __init__(self, models: list[FakeModel | str], **more: Any) -> None:
        machine = {"vram_bytes": 256 * GIB, "default_num_ctx": 4096, "load_bytes_s": 100 * GIB}
        super().__init__(models, **{**machine, **more})
        self.models: dict[str, dict[str, Any]] = {}
        self.used_bytes: dict[str, int] = {}  #: what a loaded model is measured to take, by its short name
        self.reports = True  #: False: it answers /v1/report with 404, as a single-machine node does
        self._reporter = FakeAgent(self)

    def report(self) -> Report:
        """What ``/v1/report`` says now."""
        runners, loading = self.scheduler.runners.values(), self.scheduler.loading
        loads = [self._load(short(runner.name), "ready", 1.0, runner.num_ctx) for runner in runners]
        if loading is not None:
            loads.append(self._load(short(loading.name), "loading", 0.25, self.spec.num_ctx))
        names = [short(model.name) for model in self.store.listing()]
        models = [
            ShardModel.model_validate({"model": name, "fits": True} | self.models.get(name, {}))
            for name in names
        ]
        shard = Shard(models=models, loads=loads, plans=[load.plan for load in loads if load.plan])
        return self._reporter.report().model_copy(update={"kind": "shard", "shard": shard, "gpus": []})

    def _load(self, name: str, phase: Any, progress: float, num_ctx: int) -> ShardLoad:
        plan = ShardPlan(
            id=f"plan-{self.server.port}-{len(self.scheduler.loads)}",
            model=name,
            made_at=MADE_AT,
            reason="a request",
            num_ctx=num_ctx,
            parallel=1,
            shares=[self._share("a", 0, name), self._share("b", 14, name)],
            ms_per_token=20.0,
            load_s=60.0,
        )
        return ShardLoad(
            model=name,
            phase=phase,
            progress=progress,
            eta_s=None if phase == "ready" else 42.0,
            since_s=1.0,
            plan=plan,
        )

    def _share(self, node: str, first: int, name: str) -> ShardShare:
        used = self.used_bytes.get(name)
        return ShardShare(
            node=node,
            device="CUDA0",
            first_layer=first,
            layers=14,
            output=first > 0,
            memory_bytes=20 * GIB,
            used_bytes=used // 2 if used is not None else None,
            ms_per_token=10.0,
        )

    async def _route(self, exchange: Exchange) -> None:
        if exchange.record.path == "/v1/report" and self.reports:
            await exchange.respond(200, self.report().model_dump_json().encode(), "application/json")
        else:
            await super()._route(exchange)
