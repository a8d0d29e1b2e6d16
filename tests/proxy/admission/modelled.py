"""A fleet without wires: real nodes, real decisions, the real admission, and answers that take known times.

For the virtual loop (tests/sim/virtual.py), whose time starts at 0.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from proxy_addon.admission.admission import Admission
from proxy_addon.admission.waiter import Waiter
from proxy_addon.ask import Ask
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.policies import decide
from proxy_addon.settings import Admission as Settings
from tests.proxy.placement.worlds import ask, node, resident


def now_s() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Modelled:
    """Requests are given by name; ``takes_s`` says how long a node works on each."""

    settings: Settings = field(default_factory=lambda: Settings(ahead_s=0))
    policy: str = "finish_time"
    fleet: Fleet = field(default_factory=Fleet)
    speeds: Speeds = field(default_factory=Speeds)
    takes_s: dict[str, float] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)  #: names, in order
    where: dict[str, str] = field(default_factory=dict)  #: name → node that it was started on last
    ended: list[str] = field(default_factory=list)
    most: Counter[str] = field(default_factory=Counter)  #: node → the most requests that it ever had at once

    def __post_init__(self) -> None:
        self.admission = Admission(self.fleet, self.settings, self._decide, self._start, now_s)

    def node(self, number: int, slots: int = 1, **more: Any) -> Node:
        """A node that holds the model ``m`` in memory."""
        more = {
            "resident": {"m": resident()},
            "parallel": slots,
            "parallel_known": True,
            "polled_s": 0.0,
        } | more
        return node(self.fleet, number, **more)

    def waiter(
        self, name: str, client: str = "", priority: int = 5, about: Ask | None = None, **more: Any
    ) -> Waiter:
        about = about or ask(max_tokens=100, priority=priority)
        return Waiter(id=name, ask=about, client=client or name, priority=priority, arrived_s=now_s(), **more)

    async def ask(self, name: str, takes_s: float = 1.0, **more: Any) -> Decision | None:
        """Wait in line and be answered; returns the decision by which it was started."""
        self.takes_s[name] = takes_s
        return await self.admission.admit(self.waiter(name, **more))

    def _decide(self, waiter: Waiter, closed: Mapping[str, str]) -> Decision:
        excluded = {**waiter.excluded, **closed}
        return decide(waiter.ask, self.fleet, self.speeds, now_s(), self.policy, excluded)

    def _start(self, waiter: Waiter, decision: Decision) -> None:
        assert decision.node is not None and decision.row is not None
        at = self.fleet.nodes[decision.node]
        loads = decision.row.load_s > 0
        flight = at.take(waiter.ask, now_s(), decision.expected_s, loads, decision.service_s)
        at.loaded_with[waiter.ask.key] = waiter.ask.reload_key
        self.started.append(waiter.id)
        self.where[waiter.id] = at.name
        self.most[at.name] = max(self.most[at.name], len(at.flights))
        takes_s = self.takes_s[waiter.id] + decision.row.load_s
        asyncio.get_running_loop().call_later(takes_s, partial(self._end, waiter.id, flight))

    def _end(self, name: str, flight: Flight) -> None:
        self.ended.append(name)
        flight.node.resident = {**flight.node.resident, flight.ask.key: resident()}
        flight.drop()

    async def idle(self) -> None:
        """Return once nobody waits and nothing is in flight."""
        while len(self.admission.line) or any(n.flights for n in self.fleet):
            await asyncio.sleep(0.5)
