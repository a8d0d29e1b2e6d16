"""How often each model is asked for, and under which options: what evictions cost, what replicas earn.

An exponentially fading count of arrivals, read as the rate of a Poisson process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy_addon.ask import Ask, ReloadKey

HALF_LIFE_S = 120.0  #: keep_alive is a matter of minutes, and a burst must fade
SHORTEST_S = 30.0  #: the first request of a model counts as one in so long
MAX_MODELS = 512  #: clients choose the names; the model unused for longest is forgotten
MAX_VARIANTS = 16  #: reload keys per model

_DECAY_PER_S = math.log(2) / HALF_LIFE_S


@dataclass(slots=True)
class Arrivals:
    """A fading count of requests."""

    since_s: float
    at_s: float
    count: float = 0.0

    def add(self, now_s: float) -> None:
        """Count one request."""
        self.count = self._faded(now_s) + 1
        self.at_s = now_s

    def rate_per_s(self, now_s: float) -> float:
        """Requests a second; those before the half-life was over count as if it had been as long."""
        age_s = max(now_s - self.since_s, SHORTEST_S)
        return self._faded(now_s) * _DECAY_PER_S / -math.expm1(-_DECAY_PER_S * age_s)

    def _faded(self, now_s: float) -> float:
        return self.count * math.exp(-_DECAY_PER_S * max(now_s - self.at_s, 0.0))


class Demand:
    """Arrivals by model and reload key. Times are ``loop.time()`` seconds."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Arrivals]] = {}

    def note(self, ask: Ask, now_s: float) -> None:
        """A client asks for what ``ask`` says. Once a request, when it arrives; never for retries."""
        if not ask.key or ask.unload:
            return
        variants = self._models.pop(ask.key, None)
        if variants is None:
            variants = {}
        self._models[ask.key] = variants  # at the end: who was asked for longest ago is forgotten first
        name = _variant(ask.reload_key)
        arrivals = variants.pop(name, None) or Arrivals(now_s, now_s)
        arrivals.add(now_s)
        variants[name] = arrivals
        for table, limit in ((self._models, MAX_MODELS), (variants, MAX_VARIANTS)):
            if len(table) > limit:
                del table[next(iter(table))]

    def rate_per_s(self, key: str, reload_key: ReloadKey | None, now_s: float) -> float:
        """Requests a second that a runner of ``key`` under ``reload_key`` serves; None: under whichever.

        Where it has a number of layers of its own, it serves those as well that name none.
        """
        variants = self._models.get(key)
        if variants is None:
            return 0.0
        if reload_key is None:
            return sum(arrivals.rate_per_s(now_s) for arrivals in variants.values())
        served = {_variant(reload_key), _variant(tuple(pair for pair in reload_key if pair[0] != "num_gpu"))}
        return sum(variants[name].rate_per_s(now_s) for name in served & variants.keys())

    def again_within(self, key: str, reload_key: ReloadKey | None, horizon_s: float, now_s: float) -> float:
        """Probability that the model is asked for within ``horizon_s``."""
        return -math.expm1(-self.rate_per_s(key, reload_key, now_s) * max(horizon_s, 0.0))


def _variant(reload_key: ReloadKey) -> str:
    return repr(reload_key) if reload_key else ""  # clients choose the values, and not all can be hashed
