"""SOLLOL in the simulated world: the proxy's own modules, from polls to the epilogue.

Only mitmproxy's connections are missing: what its hooks would be called for is called here, with flows that
carry nothing, and the fleet is watched through :class:`~tests.sim.in_process.Session`.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any, cast

import aiohttp
import orjson
from mitmproxy import http
from mitmproxy.test import tflow

from proxy_addon import ask as asks
from proxy_addon import record
from proxy_addon.attempt import Failure as Failed
from proxy_addon.dispatch import Dispatch
from proxy_addon.endpoints import match
from proxy_addon.epilogue import Epilogue
from proxy_addon.failover import Failover
from proxy_addon.fleet.agent_watch import AGENT_PORT
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.probe import Prober
from proxy_addon.fleet.watch import Watch
from proxy_addon.placement.calibration import observe_sizes
from proxy_addon.record import FinalStats, Record
from proxy_addon.retry import Budget
from proxy_addon.second_thoughts import SecondThoughts
from proxy_addon.settings import Settings
from tests.fakes.clock import clock_s
from tests.sim.in_process import Session
from tests.sim.world import Failure, Request, World

EARLY: dict[str, Any] = {"admission": {"ahead_s": 1e9}}  #: settings under which nothing waits in the proxy


class Ours:
    """The proxy. ``settings`` are its own."""

    def __init__(
        self, policy: str = "finish_time", settings: dict[str, Any] | None = None, name: str = "simulated"
    ) -> None:
        self.name = name
        self.settings = Settings.model_validate({"placement": policy, **(settings or {})})
        self.fleet = Fleet()
        self.speeds = Speeds()
        self.records: list[Record] = []  #: of the requests that have ended, with all their decisions
        self.fleet.on_news.append(partial(observe_sizes, speeds=self.speeds))
        self.dispatch = Dispatch(self.fleet, self.speeds, self.settings, clock_s, lambda headers: None)
        retry = self.settings.retry
        self._budget = Budget(retry.budget_ratio, retry.budget_min_per_s, retry.budget_window_s)
        self._flows: dict[Request, http.HTTPFlow] = {}
        self._requests: dict[http.HTTPFlow, Request] = {}
        self._index: dict[str, int] = {}
        self._looked: asyncio.Task[None] | None = None

    def start(self, world: World) -> None:
        """Know the nodes, look at each, then place."""
        random.seed(world.trace.seed)  # of the proxy's jitter
        nodes, agents = {}, {}
        for index, real in enumerate(world.nodes):
            host, _, port = real.host_port.partition(":")
            node = self.fleet.add(Node(host, int(port), agent_url=f"http://{host}:{AGENT_PORT}"))
            self._index[node.name] = index
            nodes[host], agents[host] = real, world.agents[index]
        session = cast(aiohttp.ClientSession, Session(nodes, agents))
        watch = Watch(self.fleet, self.settings, lambda: session, self.name)
        self._failover = Failover(self.dispatch, self._budget, watch.suspect, lambda meaning: None)
        self._second_thoughts = SecondThoughts(self.dispatch, self._take_back)
        self._epilogue = Epilogue(self.dispatch, watch.suspect, (self.records.append,))
        prober = Prober(
            self.fleet, self.speeds, lambda: session, clock_s, lambda headers: None, lambda kind, what: None
        )
        watch.start()
        prober.start()
        self._looked = asyncio.create_task(watch.looked())

    async def place(self, request: Request) -> int | None:
        """Do what the addons from Intake to Route do."""
        assert self._looked is not None
        await self._looked
        arrival, flow = request.arrival, tflow.tflow()
        endpoint = match(arrival.path)
        assert endpoint is not None
        rec = record.open_for(flow, endpoint.protocol, request.sent_s)
        rec.endpoint = endpoint
        rec.ask = asks.parse(endpoint, arrival.path, {}, orjson.dumps(arrival.body()), arrival.client)
        rec.ask.body = {}
        self._flows[request], self._requests[flow] = flow, request
        self._budget.request(clock_s())
        self.speeds.demand.note(rec.ask, clock_s())
        return self._placed(flow, rec, await self.dispatch.place(flow, rec))

    def _placed(self, flow: http.HTTPFlow, rec: Record, answer: http.Response | None) -> int | None:
        if answer is not None:
            flow.response = answer
            self._epilogue.response(flow)
            return None
        assert rec.node is not None
        self._second_thoughts.request(flow)
        return self._index[rec.node.name]

    def _of(self, request: Request) -> tuple[http.HTTPFlow, Record]:
        flow = self._flows[request]
        rec = record.of(flow)
        assert rec is not None
        return flow, rec

    def _take_back(self, flow: http.HTTPFlow, reason: str) -> bool:
        self._requests[flow].take_back(reason)
        _, rec = self._of(self._requests[flow])
        rec.abort_reason = reason
        return True

    def first_token(self, request: Request) -> None:
        """Do what the relay does with the first byte."""
        _, rec = self._of(request)
        rec.first_byte_s = clock_s()
        if rec.flight is not None:
            rec.flight.answered(rec.first_byte_s)

    def ended(self, request: Request, stats: FinalStats) -> None:
        """The answer is complete."""
        flow, rec = self._of(request)
        rec.stats, flow.response = stats, http.Response.make(200)
        self._epilogue.response(flow)

    async def failed(self, request: Request, failure: Failure) -> int | None:
        """Do what the stream does about a failed attempt."""
        flow, rec = self._of(request)
        if rec.moving:
            failed = Failed(flow, "reset", failure.text)
        elif failure.status is None:
            failed = Failed(flow, "connect", failure.text)
        else:
            failed = Failed(flow, "status", failure.text, failure.status)
        await self._failover.sollol_failure(failed)
        self._second_thoughts.sollol_failure(failed)
        if failed.retry:
            return self._placed(flow, rec, None)
        return self._placed(flow, rec, failed.response or http.Response.make(failure.status or 503))
