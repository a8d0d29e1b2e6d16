"""``make bench-routing``: who answers how soon on a simulated fleet, and what it costs. See docs/routing.md.

    python scripts/bench_routing.py [--traces mixed,swap] [--subjects oracle,envoy] [--seeds 3] [--resume]
    python scripts/bench_routing.py --from build/bench-routing.json       (the page anew, without a run)

Every run has fresh nodes and a fresh balancer that know nothing of the run before. All subjects go through a
trace of one seed, one after the other, before the next trace begins. A comparison of everything renews
docs/routing.md and its pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_routing_nodes as nodes
import bench_routing_report as report
import psutil
from bench_routing_check import check
from bench_routing_client import Clients, Target
from bench_routing_clock import run
from bench_routing_results import Figures, Results, Run
from bench_routing_subjects import ORACLE, ROOT, SUBJECTS, Broken, Place, Subject, program, running

from tests.sim.oracle import Oracle
from tests.sim.trace import Trace
from tests.sim.traces import TRACES
from tests.sim.world import Result, play

SPEED = 5.0  #: faster saves time, and counts each millisecond of a proxy that many times
SEEDS = 3
KEPT = ROOT / "build" / "bench-routing.json"
LIMIT_S = 600.0  #: a request that has not ended after ten minutes counts as failed
SATURATED_LIMIT_S = 3600.0  #: where all of the work comes at once, most of it waits long
START_S = 4.0  #: that nodes and a balancer take to start and to end
TAIL = 1.5  #: how much longer a run takes than the trace's arrivals, about
LOOK_EVERY_S = 0.5
LATE_S = 3.0  #: above this of delay by the computer itself its stumbling is measured
BUSY = 0.7  #: above this share of a core it is a program that is measured, rather than the routing


class Cpu:
    """Processor time that a process and its children use from now on."""

    def __init__(self, pid: int | None) -> None:
        self._process = psutil.Process(pid)
        self._children = pid is not None  # this process's own are the others that are measured
        self._before_s, self._begun_s = self._spent_s(), time.perf_counter()

    def _spent_s(self) -> float:
        family = [self._process, *(self._process.children() if self._children else ())]
        return sum(float(one.cpu_times().user + one.cpu_times().system) for one in family)

    def share(self) -> float:
        """Of one core, since the start."""
        return round((self._spent_s() - self._before_s) / (time.perf_counter() - self._begun_s), 3)


class Lateness:
    """How late this process is with what it wants to do; where cores are too few, others are as late."""

    def __init__(self) -> None:
        self.most_s = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            self.most_s = max(self.most_s, loop.time() - due_s)

    def stop(self) -> float:
        """The longest delay."""
        self._task.cancel()
        return round(self.most_s, 3)


@contextlib.asynccontextmanager
async def aimed(
    trace: Trace, subject: Subject, fleet: nodes.Nodes, folder: Path, speed: float
) -> AsyncIterator[tuple[Target, dict[str, int]]]:
    """Where the clients send their requests, and the processes between them and the nodes."""
    if subject.command is None:
        yield partial(known, fleet.places, await asyncio.to_thread(play, trace, Oracle())), {}
        return
    async with running(subject, fleet.places, folder, speed) as balancer:
        yield lambda _: balancer.url, {"balancer": balancer.pid}


def known(places: Sequence[Place], foreseen: Result, number: int) -> str:
    """Where the all-knowing balancer sends a request: it plays the trace in virtual time beforehand.

    So its thinking, which on a burst takes seconds, is no part of anybody's time.
    """
    node = foreseen.outcomes[number].node
    if node is None:
        raise Broken("the all-knowing balancer finds no node for a request")
    return f"http://{places[node].address}"


async def one_run(trace: Trace, subject: Subject, folder: Path, speed: float) -> Run:
    """A trace of one seed with one subject."""
    async with (
        nodes.started(trace.name, trace.seed, speed) as fleet,
        aimed(trace, subject, fleet, folder, speed) as (target, pids),
    ):
        programs = {name: Cpu(pid) for name, pid in (pids | {"nodes": fleet.pid}).items()}
        programs["client"], lateness = Cpu(None), Lateness()
        await fleet.begin()
        clients = Clients(trace.arrivals, target, SATURATED_LIMIT_S if trace.equal else LIMIT_S)
        outcomes = await clients.play()
        cpu, late_s = {name: program.share() for name, program in programs.items()}, lateness.stop()
        seen = await fleet.seen()
    loads, received = sum(seen["loads"]), sum(seen["received"])
    return Run(trace.name, trace.seed, subject.name, loads, received, cpu, late_s, outcomes)


def told(run: Run) -> str:
    """A run in a line."""
    one = Figures.of([run])
    cpu = ", ".join(f"{name} {share:.0%}" for name, share in run.cpu.items())
    wrong = [f"{outcome.verdict} {outcome.why}" for outcome in run.outcomes if outcome.verdict != "ok"]
    line = (
        f"{run.trace:11}{run.seed:3}  {run.subject:20} ttft {one.ttft.mean:7.2f} {one.ttft.p99:7.2f}"
        f"  total {one.total.mean:7.2f} {one.total.p99:7.2f}  loads {one.loads:3.0f}"
        f"  failed {report.failures(one)}  cpu {cpu}, late {run.late_s:.1f} s"
    )
    return f"{line}\n{'':16}{wrong[0]}" if wrong else line


def machine() -> str:
    """What all of it runs on."""
    return f"{os.cpu_count()} cores shared by nodes, clients and balancer"


def versions(subjects: Sequence[Subject]) -> list[str]:
    """Those of the programs that are compared."""
    found = [f"SOLLOL {version('sollol')}"]
    for name, option in (("nginx", "-v"), ("haproxy", "-v"), ("envoy", "--version")):
        if any(subject.name.startswith(name) for subject in subjects):
            said = subprocess.run([program(name), option], capture_output=True, text=True)
            found.append(f"{name} {re.findall(r'[0-9]+[.][0-9]+[.][0-9]+', said.stdout + said.stderr)[0]}")
    return found


def planned(options: argparse.Namespace) -> list[tuple[Trace, Subject]]:
    """All runs, in their order. One node alone is asked directly: there is nothing to choose."""
    return [
        (trace, SUBJECTS[name])
        for seed, make in product(range(1, options.seeds + 1), map(TRACES.get, options.traces))
        for trace in ([make(seed)] if make else [])
        for name in options.subjects
        if trace.name != report.ONE or name == ORACLE
    ]


def pace(trace: Trace, speed: float) -> float:
    """The speed of a trace's clock: where all of the work comes at once, so does all of the balancer's."""
    return max(1.0, speed / 4) if trace.equal else speed


def duration_s(runs: Sequence[tuple[Trace, Subject]], speed: float) -> float:
    """About how long they take."""
    return sum(START_S + TAIL * max(60.0, trace.arrivals[-1].at_s) / pace(trace, speed) for trace, _ in runs)


def compare(options: argparse.Namespace, results: Results) -> None:
    """Do all runs that are not among the results yet, and keep each at once."""
    done = {made.key for made in results.runs}
    runs = [(t, s) for t, s in planned(options) if (t.name, t.seed, s.name) not in done]
    print(f"{len(runs)} runs, about {duration_s(runs, options.speed) / 60:.0f} minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as scratch:
        subjects = {subject.name: subject for _, subject in runs}.values()
        run(check(list(subjects), Path(scratch), options.speed), options.speed)
        for number, (trace, subject) in enumerate(runs):
            folder, speed = Path(scratch) / str(number), pace(trace, options.speed)
            folder.mkdir()
            made = run(one_run(trace, subject, folder, speed), speed)
            print(told(made), flush=True)
            results.runs.append(made)
            results.save(options.keep)


def chosen(text: str, among: Sequence[str], what: str) -> list[str]:
    """The names of a list with commas. Raises Broken for one that there is not."""
    names = text.split(",")
    if unknown := set(names) - set(among):
        raise Broken(f"there is no {what} {', '.join(sorted(unknown))}; there are {', '.join(among)}")
    return names


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", default=",".join(TRACES), help=f"of {', '.join(TRACES)}")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--speed", type=float, default=SPEED, help="how much faster the fleet's clock runs")
    parser.add_argument("--keep", type=Path, default=KEPT, help="where the results are kept")
    parser.add_argument("--resume", action="store_true", help="do only what is not kept there yet")
    parser.add_argument("--from", type=Path, dest="made", metavar="FILE", help="no runs: what is kept there")
    parser.add_argument("--doc", action="store_true", help="renew docs/routing.md from a part, too")
    options = parser.parse_args()
    options.traces = chosen(options.traces, list(TRACES), "trace")
    options.subjects = chosen(options.subjects, list(SUBJECTS), "subject")
    return options


def resumed(kept: Path, speed: float) -> Results:
    """What was found so far. Raises Broken where it cannot be gone on with."""
    if not kept.exists():
        raise Broken(f"there is no {kept} to go on with")
    results = Results.load(kept)
    if results.about["speed"] != speed:
        raise Broken(f"{kept} was made with --speed {results.about['speed']:g}")
    return results


def show(results: Results, renew: bool) -> None:
    """Print all tables; with ``renew`` the document and the pictures, too."""
    for trace in results.names(lambda run: run.trace):
        print(
            f"\n{trace}: {report.ABOUT.get(trace, trace)}\n{report.console(report.compared(results, trace))}"
        )
    for title, table in (("aims", report.aims), ("first minute, mean s", report.first_minute),
                         ("ten equal nodes", report.tenfold), ("two proxies", report.twice)):  # fmt: skip
        print(f"\n{title}\n{report.console(table(results))}")
    for warning in report.warnings(results, BUSY, LATE_S):
        print(f"too busy to be trusted: {warning}")
    if renew:
        from bench_routing_plots import draw

        draw(results)
        report.renew(results)


def main() -> None:
    options = arguments()
    if options.made:
        show(Results.load(options.made), renew=True)
        return
    whole = (options.traces, options.subjects) == (list(TRACES), list(SUBJECTS))
    about = {
        "speed": options.speed,
        "machine": machine(),
        "versions": versions([SUBJECTS[name] for name in options.subjects]),
        "date": date.today().isoformat(),
    }
    results = resumed(options.keep, options.speed) if options.resume else Results(about)
    compare(options, results)
    show(results, renew=whole or options.doc)


if __name__ == "__main__":
    try:
        main()
    except Broken as error:
        sys.exit(f"bench_routing: {error}")
