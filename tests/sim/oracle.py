"""The all-knowing balancer: it knows every speed, every length and what each node has left to do.

It binds early, as the others do: a request is sent when it arrives, to the node where by a model of each node
(node_model.py) it does best. It does not know the future: neither what will be asked, nor what will befall.

Which "best" is best is no theorem, so there are two aims: ``own``, the node where the request itself ends
first; and ``all``, the one where the sum of all ends suffers least, those of the others in flight included,
and where no model must go whose loading again would cost more. The second is mostly better: the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from proxy_addon.record import FinalStats
from tests.fakes.clock import clock_s
from tests.fakes.engine import count_tokens
from tests.fakes.machine import NodeSpec
from tests.fakes.native_api import ANSWER_TURN, prompt_of
from tests.fakes.tokens import expected_text
from tests.sim.fleet import machines_of
from tests.sim.hardware import MODELS
from tests.sim.node_model import NodeModel, Work
from tests.sim.trace import Arrival, Event, Trace
from tests.sim.world import Failure, Request, World

RELOADS = 1.0  #: of a model that goes: that it will be wanted again is near certain in these traces
Aim = Literal["own", "all"]


def work_of(arrival: Arrival) -> Work:
    """Return all that there is to know of a request."""
    model = next(model for model in MODELS if model.name == arrival.model)
    if arrival.texts:
        tokens = sum(count_tokens(text) for text in arrival.texts)
        return Work(arrival.id, model, None, arrival.texts[-1], "", tokens, 0)
    prompt = prompt_of(arrival.messages)
    answer = ANSWER_TURN + expected_text(prompt, arrival.num_predict)
    num_ctx = arrival.options.get("num_ctx")
    return Work(
        arrival.id, model, num_ctx, prompt, answer, count_tokens(prompt), max(1, arrival.output_tokens)
    )


class AllKnowing:
    """Chooses nodes; pure: time is an argument, in a real machine's seconds."""

    def __init__(self, machines: Sequence[Mapping[str, Any]], trace: Trace, aim: Aim = "all") -> None:
        self.nodes = [NodeModel(NodeSpec(**machine)) for machine in machines]
        self.aim = aim
        self._events = sorted(trace.events, key=lambda event: event.at_s)
        self._out = set(trace.late)
        self._where: dict[str, int] = {}
        for node in self.nodes:
            for model in trace.warm:
                node.hold(model)

    def choose(self, arrival: Arrival, now_s: float) -> int | None:
        """Choose a node for a request, and count it there."""
        self._advance(now_s)
        work = work_of(arrival)
        costs = {
            index: self._cost(node, work) for index, node in enumerate(self.nodes) if index not in self._out
        }
        if not costs:
            return None
        best = min(costs, key=lambda index: costs[index])
        self.nodes[best].add(work)
        self._where[arrival.id] = best
        return best

    def ended(self, arrival: Arrival, now_s: float) -> None:
        """Learn that a request has ended in truth."""
        self._advance(now_s)
        self.nodes[self._where.pop(arrival.id)].forget(arrival.id)

    def _cost(self, node: NodeModel, work: Work) -> float:
        with_it = node.copy()
        with_it.add(work.copy())
        if self.aim == "own":
            with_it.advance(math.inf, work.id)
            return with_it.finished[work.id] - node.now_s
        without = node.copy()
        return _ends(with_it) - _ends(without) + RELOADS * _lost_s(with_it, without)

    def _advance(self, now_s: float) -> None:
        while self._events and self._events[0].at_s <= now_s:
            event = self._events.pop(0)
            node = self.nodes[event.node]
            node.advance(max(event.at_s, node.now_s))
            self._befall(event, node)
        for node in self.nodes:
            if now_s > node.now_s:
                node.advance(now_s)

    def _befall(self, event: Event, node: NodeModel) -> None:
        if event.what == "slow":
            node.spec.slow_factor = event.factor
        elif event.what == "fail_fast":
            self._out.add(event.node)
        elif event.what == "join":
            self._out.discard(event.node)
        else:
            if node.spec.gpu_lost != (event.what == "lose_gpu"):
                node.spec.gpu_lost = event.what == "lose_gpu"
                node.expire_all()
            if event.what == "recover":
                node.spec.slow_factor = 1.0
                self._out.discard(event.node)


def _lost_s(with_it: NodeModel, without: NodeModel) -> float:
    """Return how long it would take to load again what is gone from the one node and not from the other."""
    kept = {(runner.model.blob, runner.num_ctx) for runner in with_it.runners.values()}
    gone = [r.model.size for r in without.runners.values() if (r.model.blob, r.num_ctx) not in kept]
    return sum(gone) / without.spec.load_bytes_s


def _ends(node: NodeModel) -> float:
    """Return the sum of the seconds until each request of a node ends."""
    began_s = node.now_s
    while node.busy:
        node.advance(node.next_s())
    return sum(done_s - began_s for done_s in node.finished.values())


class Oracle:
    """The all-knowing balancer in the simulated world."""

    def __init__(self, aim: Aim = "all") -> None:
        self._aim: Aim = aim
        self._mind: AllKnowing | None = None
        self._start_s = 0.0

    def start(self, world: World) -> None:
        """Know everything."""
        self._mind = AllKnowing(machines_of(world.trace), world.trace, self._aim)
        self._start_s = world.start_s

    async def place(self, request: Request) -> int | None:
        """Choose a node."""
        assert self._mind is not None
        return self._mind.choose(request.arrival, clock_s() - self._start_s)

    def first_token(self, request: Request) -> None:
        """Nothing is made of it."""

    def ended(self, request: Request, stats: FinalStats) -> None:
        """Keep the model true."""
        assert self._mind is not None
        self._mind.ended(request.arrival, clock_s() - self._start_s)

    async def failed(self, request: Request, failure: Failure) -> int | None:
        """It knew; so nothing can."""
        return None
