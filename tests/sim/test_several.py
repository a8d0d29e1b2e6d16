"""What two proxies over one fleet cost beside one, in virtual seconds: a guard, not a measurement.

The figures over more seeds are those of ``python -m tests.sim --proxies 2`` (docs/routing.md).
"""

from __future__ import annotations

import pytest

from proxy_addon.fleet.shares import Share
from tests.sim.ours import Ours
from tests.sim.several import Several
from tests.sim.test_aims import mean_s
from tests.sim.traces import TRACES
from tests.sim.world import play

NEAR = 1.2  #: times one proxy's mean


def two() -> Several:
    return Several(2, lambda name: Ours(name=name))


def test_two_proxies_that_see_each_other_come_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace() -> float:
        return mean_s(play(TRACES["contexts"](seed=1), two()))

    alone = mean_s(play(TRACES["contexts"](seed=1), Ours()))
    assert trace() <= NEAR * alone
    monkeypatch.setattr(Share, "keep", lambda *_: None)  # the same two, blind
    assert trace() > NEAR * alone
