"""What the balancers do that know nothing of models: counting connections, or taking turns.

As nginx does them: a node that failed is not chosen for ``fail_timeout`` (10 s), and the request goes to the
next one (``proxy_next_upstream error timeout http_500``). Ties take turns.
"""

from __future__ import annotations

from proxy_addon.record import FinalStats
from tests.fakes.clock import clock_s
from tests.sim.world import Failure, Request, World

FAIL_TIMEOUT_S = 10.0  #: nginx' default


class Blind:
    """Chooses among the nodes that did not fail lately."""

    def __init__(self) -> None:
        self.active: list[int] = []
        self.turns: list[int] = []
        self._turn = 0
        self._out_until_s: list[float] = []
        self._tried: dict[Request, set[int]] = {}

    def start(self, world: World) -> None:
        """Learn how many nodes there are."""
        count = len(world.nodes)
        self.active, self.turns, self._out_until_s = [0] * count, [0] * count, [0.0] * count

    def rank(self, node: int) -> tuple[float, ...]:
        """Return what the chosen node has least of."""
        raise NotImplementedError

    async def place(self, request: Request) -> int | None:
        """Choose a node."""
        now_s, tried = clock_s(), self._tried.setdefault(request, set())
        left = [node for node in range(len(self.active)) if node not in tried]
        found = [node for node in left if now_s >= self._out_until_s[node]] or left
        if not found:
            return None
        node = min(found, key=self.rank)
        self._turn += 1
        self.turns[node] = self._turn
        self.active[node] += 1
        return node

    def first_token(self, request: Request) -> None:
        """Nothing is made of it."""

    def ended(self, request: Request, stats: FinalStats) -> None:
        """One connection less."""
        self.active[request.node] -= 1
        self._tried.pop(request)

    async def failed(self, request: Request, failure: Failure) -> int | None:
        """Try the next one."""
        self.active[request.node] -= 1
        self._tried[request].add(request.node)
        self._out_until_s[request.node] = clock_s() + FAIL_TIMEOUT_S
        return await self.place(request)


class LeastConnections(Blind):
    """The fewest active connections."""

    def rank(self, node: int) -> tuple[float, ...]:
        """By connections, then by turns."""
        return self.active[node], self.turns[node]


class RoundRobin(Blind):
    """Whose last turn is longest ago."""

    def rank(self, node: int) -> tuple[float, ...]:
        """By turns."""
        return (self.turns[node],)
