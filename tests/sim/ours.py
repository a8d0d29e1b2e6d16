"""SOLLOL in the simulated world: the proxy's own fleet, polls' results, decisions, learning and failover.

Only mitmproxy is missing: what its hooks do with a flow (``dispatch.py``, ``failover.py``, ``epilogue.py``)
is done here with a :class:`~tests.sim.world.Request`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import orjson

from agent.ollama.names import canonical
from agent.report import Model, Resident
from proxy_addon import ask as asks
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Endpoint, match
from proxy_addon.failover import BREAKING, FULL_S, HOPELESS, MAX_BROKEN, UNFIT_S, UNHEALTHY
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.liveness import Liveness
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.placement.calibration import observe_sizes
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import decide
from proxy_addon.record import FinalStats
from proxy_addon.retry import Meaning, backoff_s, classify, may_retry
from proxy_addon.settings import Poll, Retry
from tests.fakes.clock import clock_s
from tests.fakes.models_api import ps_row, tags_row
from tests.sim.world import Failure, Request, SimNode, World


@dataclass(slots=True)
class Placed:
    """What the proxy knows of a request besides its ask."""

    ask: Ask
    endpoint: Endpoint
    decision: Decision | None = None
    flight: Flight | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    hopeless: dict[str, str] = field(default_factory=dict)
    broken: int = 0
    rounds: int = 0


class Ours:
    """The proxy, early binding: a request is placed when it arrives."""

    def __init__(self, policy: str = "finish_time", poll: Poll | None = None) -> None:
        self.policy = policy
        self.fleet = Fleet()
        self.speeds = Speeds()
        self.decisions: list[tuple[Request, Decision]] = []
        self._poll = poll or Poll()
        self._retry = Retry()
        self._placed: dict[Request, Placed] = {}
        self._index: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.fleet.on_news.append(lambda node: observe_sizes(node, self.speeds))

    # the polls

    def start(self, world: World) -> None:
        """Know the nodes and look at each of them every second."""
        for index, real in enumerate(world.nodes):
            host, _, port = real.host_port.partition(":")
            node = self.fleet.add(Node(host, int(port), agent_url=f"http://{host}:11435"))
            self._index[node.name] = index
            task = asyncio.create_task(self._watch(node, real, world))
            self._tasks.add(task)

    async def _watch(self, node: Node, real: SimNode, world: World) -> None:
        alive = Liveness(self._poll.failures_to_lose)
        while True:
            await self._look(node, real, world, alive)
            await asyncio.sleep(self._poll.interval_s)

    async def _look(self, node: Node, real: SimNode, world: World, alive: Liveness) -> None:
        if not real.reachable:
            if alive.failed(clock_s(), at_once=True) is not None:
                node.poll_error, node.resident = "it refused the connection", {}
                self.fleet.lost(node, node.poll_error)
            return
        if not node.models:
            rows = [Model.model_validate(tags_row(model)) for model in real.store.listing()]
            node.models = {canonical(row.name): row for row in rows}
            for model in real.store.listing():
                self.fleet.shapes.setdefault(model.digest, model.model_info())
        runners = await real.scheduler.resident()
        residents = [Resident.model_validate(ps_row(runner)) for runner in runners]
        node.resident = {canonical(row.name): row for row in residents}
        node.report = world.agents[real.index].report()
        node.report_s = node.polled_s = clock_s()
        node.poll_latency_s = 0.001
        node.poll_error = None
        if alive.answered(clock_s()) == "back":
            node.health.polled()
        self.fleet.news(node)

    # a request's way

    def ask_of(self, request: Request) -> Placed:
        """Return what the proxy makes of a request."""
        arrival = request.arrival
        endpoint = match(arrival.path)
        assert endpoint is not None
        content = orjson.dumps(arrival.body())
        return Placed(asks.parse(endpoint, arrival.path, {}, content, arrival.client), endpoint)

    async def place(self, request: Request) -> int | None:
        """Decide, and count the request in flight there; try again after a back-off where nobody can."""
        placed = self._placed.setdefault(request, self.ask_of(request))
        while True:
            now_s = clock_s()
            decision = decide(
                placed.ask, self.fleet, self.speeds, now_s, policy=self.policy, excluded=placed.excluded
            )
            if decision.node is not None:
                return self._take(request, placed, decision, now_s)
            placed.rounds += 1
            if placed.rounds >= self._retry.rounds:
                return None
            await asyncio.sleep(
                backoff_s(placed.rounds, self._retry.backoff_s, self._retry.backoff_max_s, 0.5)
            )
            placed.excluded = dict(placed.hopeless)

    def _take(self, request: Request, placed: Placed, decision: Decision, now_s: float) -> int:
        assert decision.node is not None and decision.chosen is not None
        node = self.fleet.nodes[decision.node]
        placed.decision = decision
        placed.flight = node.take(
            placed.ask,
            now_s,
            decision.expected_s,
            load=decision.chosen.terms.get("load_s", 0.0) > 0,
            service_s=decision.service_s,
        )
        node.loaded_with[placed.ask.key] = placed.ask.reload_key
        self.decisions.append((request, decision))
        return self._index[node.name]

    def first_token(self, request: Request) -> None:
        """The first byte came."""
        flight = self._placed[request].flight
        assert flight is not None
        flight.first_byte_s = clock_s()

    def ended(self, request: Request, stats: FinalStats) -> None:
        """Learn from an answer."""
        placed, now_s = self._placed.pop(request), clock_s()
        flight = placed.flight
        assert flight is not None
        node, concurrency = flight.node, len(flight.node.flights)
        flight.drop()
        node.health.succeeded()
        first_byte_s = (flight.first_byte_s or now_s) - request.placed_s
        self.speeds.observe(
            node, placed.ask, stats, first_byte_s, now_s - request.placed_s, concurrency, now_s
        )

    def failed(self, request: Request, failure: Failure) -> bool:
        """Tell the fleet, and say whether another node may be tried."""
        placed, now_s = self._placed[request], clock_s()
        flight, phase = placed.flight, "connect" if failure.status is None else "status"
        assert flight is not None
        node = flight.node
        flight.drop()
        meaning = classify(phase, failure.status, failure.text, placed.endpoint)
        if meaning in UNHEALTHY:
            node.health.failed(now_s, failure.text, fatal=UNHEALTHY[meaning])
            self.speeds.observe_failure(node.name, now_s - request.placed_s, now_s)
        elif meaning is Meaning.FULL:
            node.full_until_s = now_s + FULL_S
        elif meaning is Meaning.TOO_SMALL:
            node.unfit_until_s[placed.ask.key] = now_s + UNFIT_S
        placed.broken += meaning in BREAKING
        if placed.broken >= MAX_BROKEN or not may_retry(meaning, phase, placed.endpoint, True):
            return False
        placed.excluded[node.name] = str(meaning)
        if meaning in HOPELESS:
            placed.hopeless[node.name] = str(meaning)
        return True
