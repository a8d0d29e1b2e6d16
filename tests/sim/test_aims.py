"""What the proxy's choices are worth on simulated fleets, in virtual seconds: a guard, not a measurement.

The figures are those of ``make bench-routing`` and ``python -m tests.sim`` (docs/routing.md); the bounds here
leave room for one seed's luck.
"""

from __future__ import annotations

from statistics import fmean

import pytest

from tests.sim.blind import LeastConnections
from tests.sim.oracle import Oracle
from tests.sim.ours import Ours
from tests.sim.traces import TRACES
from tests.sim.world import Result, play

NEAR = 1.5  #: times the all-knowing balancer's mean; the aim over many seeds is 1.2


def mean_s(result: Result) -> float:
    return fmean(outcome.total_s for outcome in result.outcomes)


def p99_s(result: Result) -> float:
    return sorted(outcome.total_s for outcome in result.outcomes)[-3]


@pytest.mark.parametrize("trace", ["mixed", "contexts", "silent_cpu", "fail_fast"])
def test_without_being_told_speeds_or_lengths_it_comes_near_who_knows_them_all(trace: str) -> None:
    knowing, blind, ours = (
        play(TRACES[trace](seed=2), balancer) for balancer in (Oracle(), LeastConnections(), Ours())
    )
    assert not any(outcome.failed for outcome in ours.outcomes)
    assert mean_s(ours) <= NEAR * mean_s(knowing)
    assert p99_s(ours) <= p99_s(blind) / 4
    assert ours.loads < blind.loads / 2
