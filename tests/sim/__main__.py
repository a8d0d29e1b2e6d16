"""``python -m tests.sim``: traces in virtual time under each balancer, as a table."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from proxy_addon.fleet.shares import Share
from tests.sim.blind import LeastConnections, RoundRobin
from tests.sim.oracle import Oracle
from tests.sim.ours import EARLY, Ours
from tests.sim.several import Several
from tests.sim.traces import TRACES
from tests.sim.world import Balancer, Result, play

OTHERS: dict[str, Callable[[], Balancer]] = {
    "oracle": Oracle,
    "oracle_own": lambda: Oracle("own"),
    "least_conn": LeastConnections,
    "round_robin": RoundRobin,
}
OURS: dict[str, Callable[[str], Ours]] = {
    "finish_time": lambda name: Ours(name=name),
    "early": lambda name: Ours(settings=EARLY, name=name),
    "score": lambda name: Ours("score", name=name),
    "least_loaded": lambda name: Ours("least_loaded", name=name),
}


def balancer(name: str, proxies: int = 1) -> Balancer:
    """Make a balancer; of SOLLOL's as many as ``proxies``."""
    if name not in OURS:
        return OTHERS[name]()
    make = OURS[name]
    return make("proxy1") if proxies == 1 else Several(proxies, make)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a table says of one trace under one balancer: means over seeds."""

    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    total_mean_s: float
    total_p50_s: float
    total_p99_s: float
    loads: float
    tokens_s: float
    failed: float
    cpu_s: float


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def figures(results: Sequence[Result], cpu_s: float) -> Figures:
    """Return the means over ``results`` of each one's figures."""

    def mean(of: Callable[[Result], float]) -> float:
        return fmean(of(result) for result in results)

    return Figures(
        mean(lambda r: fmean(o.ttft_s for o in r.outcomes)),
        mean(lambda r: quantile([o.ttft_s for o in r.outcomes], 0.5)),
        mean(lambda r: quantile([o.ttft_s for o in r.outcomes], 0.99)),
        mean(lambda r: fmean(o.total_s for o in r.outcomes)),
        mean(lambda r: quantile([o.total_s for o in r.outcomes], 0.5)),
        mean(lambda r: quantile([o.total_s for o in r.outcomes], 0.99)),
        mean(lambda r: r.loads),
        mean(lambda r: sum(o.tokens for o in r.outcomes) / r.duration_s),
        mean(lambda r: sum(o.failed for o in r.outcomes)),
        cpu_s / len(results),
    )


COLUMNS = (
    ("ttft_mean_s", 9, 2),
    ("ttft_p50_s", 7, 2),
    ("ttft_p99_s", 8, 2),
    ("total_mean_s", 10, 2),
    ("total_p50_s", 7, 2),
    ("total_p99_s", 8, 2),
    ("loads", 6, 1),
    ("tokens_s", 6, 0),
    ("failed", 6, 1),
    ("cpu_s", 6, 2),
)  #: field of Figures, width, digits
HEAD = (
    f"{'trace':<11} {'balancer':<13} ttft mean     p50      p99 total mean     p50      p99  loads  tok/s "
    "failed  cpu s | mean/oracle   p99/oracle   p99/least_conn"
)


def row(trace: str, balancer: str, found: Figures, oracle: Figures | None, blind: Figures | None) -> str:
    """Return a line of the table."""
    cells = " ".join(f"{getattr(found, name):>{width}.{digits}f}" for name, width, digits in COLUMNS)
    ratios = (
        oracle and found.total_mean_s / oracle.total_mean_s,
        oracle and found.total_p99_s / oracle.total_p99_s,
        blind and found.total_p99_s / blind.total_p99_s,
    )
    against = " ".join(f"{ratio:>12.3f}" if ratio else f"{'':>12}" for ratio in ratios)
    return f"{trace:<11} {balancer:<13} {cells} |{against}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", default="all", help="comma-separated; all: each")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 1 on")
    parser.add_argument(
        "--balancer", default="oracle,least_conn,finish_time", help="comma-separated; all: each"
    )
    parser.add_argument(
        "--proxies",
        type=int,
        default=1,
        help="of SOLLOL's over the fleet, that are given requests in turn",
    )
    parser.add_argument("--blind", action="store_true", help="they do not see each other's work")
    options = parser.parse_args()
    if options.blind:
        Share.keep = lambda *_: None  # type: ignore[method-assign]
    names = [*OTHERS, *OURS] if options.balancer == "all" else options.balancer.split(",")
    traces = list(TRACES) if options.trace == "all" else options.trace.split(",")
    logging.basicConfig(level=logging.ERROR)  # that nodes come and go is the trace's own doing
    seeds = range(1, options.seeds + 1)
    print(HEAD)
    for trace in traces:
        known: dict[str, Figures] = {}
        for name in names:
            began = time.process_time()
            results = [play(TRACES[trace](seed), balancer(name, options.proxies), name) for seed in seeds]
            known[name] = figures(results, time.process_time() - began)
            print(row(trace, name, known[name], known.get("oracle"), known.get("least_conn")), flush=True)


if __name__ == "__main__":
    main()
