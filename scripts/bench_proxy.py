"""``make bench-proxy``: what proxies cost, side by side before one fake node. See docs/performance.md.

    python scripts/bench_proxy.py [--subjects direct,envoy,sollol] [--quick] [--json]
    python scripts/bench_proxy.py --from build/bench-proxy.json       (the page anew, without a run)

All subjects run at the same time and are measured in turns, so that what else the machine does hits all
alike. Each proxy is kept on one core, node and clients on another. A whole run renews docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_proxy_report as report
import psutil
from bench_proxy_check import check
from bench_proxy_client import GRACE_S, SmallFound, SmallTask, StreamFound, StreamTask
from bench_proxy_results import Figures, Many, Results, Small, Streams, median
from bench_proxy_subjects import DIRECT, OWN, SUBJECTS, Cores, Family, Running, node, running, spawn
from bench_routing_subjects import HERE, ROOT, Broken
from pydantic import TypeAdapter

KEPT = ROOT / "build" / "bench-proxy.json"
CHUNKS, CHUNKS_PER_S = 100, 100.0  #: of each stream side by side: a small model on a good GPU
MANY, MANY_PER_S = 1000, 20.0
LOOK_EVERY_S = 0.5
CLIENT_LIMIT_S = 180.0


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    small_s: float  #: of small requests, per round and concurrency
    streams: int  #: side by side
    idle_s: float
    ramp_s: float  #: in which the thousand streams are opened, and over which they end
    steady_s: float  #: with all of them open


WHOLE = Plan(rounds=3, small_s=2.5, streams=32, idle_s=6.0, ramp_s=6.0, steady_s=10.0)
QUICK = Plan(rounds=1, small_s=1.0, streams=8, idle_s=3.0, ramp_s=4.0, steady_s=2.0)


class Bench:
    """One run: the subjects that could be started, and what is found of them."""

    def __init__(self, plan: Plan, cores: Cores, folder: Path) -> None:
        self.plan, self.cores, self.folder = plan, cores, folder

    async def measure(self, one: Running, figures: Figures, round_: int) -> None:
        """One round of a subject."""
        for concurrency in report.CONCURRENCIES:
            figures.small.append(await self.small(one, concurrency))
        figures.streams.append(await self.streams(one))
        _say(f"round {round_ + 1}, {one.subject.name}: {_told(figures)}")

    async def small(self, one: Running, concurrency: int) -> Small:
        """Small requests, one after the other on so many connections."""
        task = SmallTask(one.port, one.subject.api.small(), concurrency, self.plan.small_s)
        with Spent(one) as spent:
            found = await self._clients(task, SmallFound)
        cpu_us = spent.busy_s / found.answered * 1e6 if found.answered else float("nan")
        return Small(**vars(found), concurrency=concurrency, cpu_us=cpu_us)

    async def streams(self, one: Running) -> Streams:
        """Streams side by side; heads and ends included."""
        request = one.subject.api.stream(CHUNKS, CHUNKS_PER_S)
        limit_s = CLIENT_LIMIT_S / 2  # ollama-herd takes one after the other
        # Begun one after the other, each a bit later within the time of a chunk: streams of different people
        # do not tick together, and a proxy must wake for each piece, not for all of them at once.
        ramp_s = (self.plan.streams + 1) / CHUNKS_PER_S
        task = StreamTask(
            one.port, request, self.plan.streams, CHUNKS, CHUNKS_PER_S, ramp_s=ramp_s, limit_s=limit_s
        )
        with Spent(one) as spent:
            found = await self._clients(task, StreamFound)
        cpu_ms = spent.busy_s / self.plan.streams * 1e3 if found.came == found.asked else float("nan")
        return Streams(**vars(found), cpu_ms=cpu_ms)

    async def measure_many(self, one: Running, figures: Figures) -> None:
        """A thousand streams, opened and ended evenly."""
        plan = self.plan
        chunks = int((plan.ramp_s + plan.steady_s) * MANY_PER_S)
        request = one.subject.api.stream(chunks, MANY_PER_S)
        limit_s = 2 * plan.ramp_s + plan.steady_s + GRACE_S
        task = StreamTask(one.port, request, MANY, chunks, MANY_PER_S, plan.ramp_s, limit_s)
        base_mb = one.family.rss_mb() if one.family else float("nan")
        with Spent(one) as spent:
            async with _watched(one) as seen_mb:
                found = await self._clients(task, StreamFound)
        most_mb = max(seen_mb, default=float("nan"))
        cpu_share = spent.busy_s / spent.wall_s
        figures.many = Many(
            **vars(found), streams=MANY, cpu_share=cpu_share, base_mb=base_mb, most_mb=most_mb
        )

    async def _clients[T](self, task: SmallTask | StreamTask, found: type[T]) -> T:
        """Let a process of clients do a task. Raises Broken where it does not end as it should."""
        log = self.folder / "clients.log"
        command = [sys.executable, str(HERE / "bench_proxy_client.py"), json.dumps(dataclasses.asdict(task))]
        process = await spawn(command, self.cores.others, self.folder, os.environ, log, listen=True)
        try:
            async with asyncio.timeout(CLIENT_LIMIT_S):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise Broken(f"the clients failed: {log.read_text()[-500:]}")
        return TypeAdapter(found).validate_json(out)


class Spent:
    """What a subject uses of a core meanwhile, beyond what it does unasked; not a number without a proxy."""

    busy_s = wall_s = float("nan")

    def __init__(self, one: Running) -> None:
        self._one = one

    def _cpu_s(self) -> float:
        return self._one.family.cpu_s() if self._one.family else float("nan")

    def __enter__(self) -> Spent:
        self._before_s, self._begun_s = self._cpu_s(), time.perf_counter()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed:
            return  # the subject may be gone
        self.wall_s = time.perf_counter() - self._begun_s
        self.busy_s = self._cpu_s() - self._before_s - self._one.idle_share * self.wall_s


@contextlib.asynccontextmanager
async def _watched(one: Running) -> AsyncIterator[list[float]]:
    """Resident memory, looked at from time to time: nobody reports it."""
    seen_mb: list[float] = []

    async def look() -> None:
        while one.family:
            seen_mb.append(one.family.rss_mb())
            await asyncio.sleep(LOOK_EVERY_S)

    task = asyncio.create_task(look())
    try:
        yield seen_mb
    finally:
        task.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(figures: Figures) -> str:
    """A subject's last round in a line."""
    small = figures.small[-len(report.CONCURRENCIES) :]
    parts = [f"{one.concurrency}: {one.p50_ms:.2f} {one.p99_ms:.2f} ms {one.cpu_us:.0f} µs" for one in small]
    return f"{'; '.join(parts)}; a stream {figures.streams[-1].cpu_ms:.2f} ms"


def interpreter() -> str:
    """Which Python it is, and of what system: builds of the same version differ by a fifth in speed."""
    systems = (platform.freedesktop_os_release()["PRETTY_NAME"],) if sys.platform == "linux" else ()
    return " on ".join((f"{platform.python_implementation()} {platform.python_version()}", *systems))


def yardstick_us() -> float:
    """How fast this machine is just now: ``sum(range(1000))``, about 10 µs on an idle desktop of 2024."""
    begun_s = time.perf_counter()
    for _ in range(1000):
        sum(range(1000))
    return (time.perf_counter() - begun_s) * 1e3


class Foreign:
    """What other programs use of the machine from now on."""

    def __init__(self) -> None:
        self._before_s = self._now_s()

    @staticmethod
    def _now_s() -> tuple[float, float]:
        whole, ended = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = Family(os.getpid()).cpu_s() + ended.ru_utime + ended.ru_stime
        return sum(whole) - whole.idle - getattr(whole, "iowait", 0.0) - own_s, sum(whole)

    def share(self) -> float:
        """Of all cores' time."""
        foreign_s, whole_s = (now - then for now, then in zip(self._now_s(), self._before_s, strict=True))
        return max(0.0, foreign_s / whole_s)


async def compare(names: Sequence[str], plan: Plan, results: Results) -> None:
    """Start all subjects, check them, and measure them in turns."""
    cores = Cores.of(os.sched_getaffinity(0))
    found = {name: Figures(name, SUBJECTS[name].title) for name in names}
    results.figures = list(found.values())
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sollol-bench-")))
        place = await stack.enter_async_context(node(cores.others, folder))
        bench, started, ends = Bench(plan, cores, folder), [], {}
        for name in names:
            end = await stack.enter_async_context(contextlib.AsyncExitStack())
            try:
                found[name].version = SUBJECTS[name].version()
                one = await end.enter_async_context(
                    running(SUBJECTS[name], place, cores.proxy, folder / name)
                )
                await check(one, place.address)
            except Broken as error:
                found[name].note = str(error)
                await end.aclose()
                _say(f"{name}: {error}")
            else:
                started.append(one)
                ends[name] = end
        foreign = Foreign()
        await _idle(started, plan.idle_s)
        for one in started:
            found[one.subject.name].idle_share = one.idle_share
        yardsticks = []
        for round_ in range(plan.rounds):
            yardsticks.append(yardstick_us())
            for one in started[:: 1 if round_ % 2 == 0 else -1]:
                its = found[one.subject.name]
                if not await lasted(its, bench.measure(one, its, round_)):
                    started.remove(one)
        for one in started:
            its = found[one.subject.name]
            if await lasted(its, bench.measure_many(one, its)):
                _say(f"{MANY} streams, {one.subject.name}: {its.many}")
            await ends[one.subject.name].aclose()  # so that what it still works off is nobody else's trouble
        yardsticks.append(yardstick_us())
        results.about |= {"yardstick_us": median(yardsticks), "foreign_share": foreign.share()}


async def lasted(figures: Figures, measuring: Awaitable[None]) -> bool:
    """Whether a subject was there to the end of a measurement; the others go on without it."""
    try:
        await measuring
    except (Broken, psutil.Error, TimeoutError) as error:
        figures.note = f"it ended, or its clients did, while it was measured: {error!r}"
        _say(f"{figures.name}: {figures.note}")
        return False
    return True


async def _idle(started: Sequence[Running], seconds: float) -> None:
    """What each uses of a core while nobody asks anything."""
    with contextlib.ExitStack() as stack:
        spent = [(one, stack.enter_context(Spent(one))) for one in started]
        await asyncio.sleep(seconds)
    for one, its in spent:
        one.idle_share = its.busy_s / its.wall_s


async def interruptible(names: Sequence[str], plan: Plan, results: Results) -> None:
    """Compare; ended from outside, end what was started."""
    task = asyncio.ensure_future(compare(names, plan, results))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--quick", action="store_true", help="one short round: three minutes, rough figures")
    parser.add_argument("--json", action="store_true", help="print the results as they are kept")
    parser.add_argument("--keep", type=Path, default=KEPT, help="where the results are kept")
    parser.add_argument("--from", type=Path, dest="made", metavar="FILE", help="no run: what is kept there")
    parser.add_argument("--doc", action="store_true", help="renew docs/performance.md from a part, too")
    options = parser.parse_args()
    names = options.subjects.split(",")
    if unknown := set(names) - set(SUBJECTS):
        parser.error(f"there is no subject {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    options.names = [name for name in SUBJECTS if name in names or name == DIRECT]
    return options


def main() -> int:
    options = arguments()
    if options.made:
        results = Results.load(options.made)
    else:
        plan = QUICK if options.quick else WHOLE
        cores = os.cpu_count()
        machine = f"{cores} cores, of which the proxy had one, and node and clients had another"
        about = {
            "date": date.today().isoformat(), "machine": machine, "python": interpreter(),
            "quick": options.quick, "rounds": plan.rounds,
        }  # fmt: skip
        results = Results(about)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        asyncio.run(interruptible(options.names, plan, results))
        results.save(options.keep)
    print(results.json() if options.json else report.text(results))
    if options.doc or options.made or (options.names == list(SUBJECTS) and not options.quick):
        report.renew(results)
    own = results.of(OWN)
    return 1 if own and own.note else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as error:
        sys.exit(f"bench_proxy: {error}")
    except asyncio.CancelledError:
        sys.exit("bench_proxy: it was told to end")
