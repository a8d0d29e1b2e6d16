"""Several proxies over one fleet, behind a balancer that gives each a request in turn, as nginx does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

from proxy_addon.record import FinalStats
from tests.sim.ours import Ours
from tests.sim.world import Failure, Request, World


class Several:
    """Proxies that know of each other through the agents alone. ``make`` makes one of that name."""

    def __init__(self, count: int, make: Callable[[str], Ours]) -> None:
        self.proxies = [make(f"proxy{number}") for number in range(1, count + 1)]
        self._turns = cycle(self.proxies)
        self._of: dict[Request, Ours] = {}

    def start(self, world: World) -> None:
        """All of them."""
        for proxy in self.proxies:
            proxy.start(world)

    async def place(self, request: Request) -> int | None:
        """Let the next one choose."""
        proxy = self._of[request] = next(self._turns)
        return await proxy.place(request)

    def first_token(self, request: Request) -> None:
        """Tell the one that chose."""
        self._of[request].first_token(request)

    def ended(self, request: Request, stats: FinalStats) -> None:
        """Tell the one that chose."""
        self._of.pop(request).ended(request, stats)

    async def failed(self, request: Request, failure: Failure) -> int | None:
        """Let the one that chose choose again."""
        return await self._of[request].failed(request, failure)
