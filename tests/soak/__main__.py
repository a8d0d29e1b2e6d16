"""``make soak``: a fleet of real processes under fire; exit status 1 if anything was broken.

    python -m tests.soak --minutes 30 --clients 200 --seed 1

Warm-up, a first half with restarts of the proxy, a rest to measure the last process, a second half without
restarts, a calm, and a rest to measure the same process again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from math import inf
from pathlib import Path

import aiohttp

from tests.soak.house import HOUSES
from tests.soak.judge import Violation, excused, judge
from tests.soak.ledger import GRACE_S, Ledger
from tests.soak.measure import KEPT_IDLE_S, grown, idle_nodes, settled
from tests.soak.node import STATE
from tests.soak.outcome import LIMIT_S, Outcome
from tests.soak.processes import ROOT, Clients, Node, Program, Proxy, free_ports
from tests.soak.report import report
from tests.soak.schedule import Kind, schedule
from tests.soak.storm import Broken, Storm

WARM_S = GRACE_S + 2.0  #: from then on the nodes count as well
CALM_S = GRACE_S + 5.0  #: after the storm: everything must work as before
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
LONG_MINUTES = 5.0
REST_MORE_S = 5.0
SHOWN = 20  #: violations that are printed; all are in the folder


def built() -> set[Kind]:
    """What of the storm this build knows at all; once it has the file, the deed must succeed."""
    parts: dict[Kind, str] = {"reload": "reload.py", "upgrade": "handover.py"}
    return {kind for kind, file in parts.items() if (ROOT / "proxy_addon" / file).exists()}


@asynccontextmanager
async def running(programs: Sequence[Program]) -> AsyncIterator[None]:
    """However it ends, none of ``programs`` outlives it."""
    try:
        yield
    finally:
        await asyncio.gather(*(program.kill() for program in programs))


async def soak(options: argparse.Namespace, folder: Path) -> int:
    """Run it; the exit status."""
    began_s = time.monotonic()
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # so that nothing outlives it
    count = len(HOUSES)
    proxy_port, *ports = free_ports(1 + 2 * count)
    nodes = [Node(i, house, ports[i], ports[count + i], folder) for i, house in enumerate(HOUSES)]
    proxy = Proxy(proxy_port, nodes, folder, options.proxy_args)
    clients = Clients(proxy.url, options.clients, options.seed, folder)
    ledger = Ledger()
    for node in nodes:
        for model in node.house.models:
            ledger.gains(node.host_port, model, -inf)
    proxy.configure()
    programs = [proxy, clients, *nodes, *(node.agent for node in nodes)]
    half_s = options.minutes * 60 / 2
    # In a long soak the proxy rests until it has closed what it keeps for requests; in a short one it may
    # keep as many connections to nodes as there were requests at once.
    long = options.minutes >= LONG_MINUTES
    rest_s, kept = (KEPT_IDLE_S + REST_MORE_S, 0) if long else (0.0, options.clients)
    node_ports = {node.port for node in nodes}
    reloads = "reload" in built()
    upgrades = "upgrade" in built()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(programs))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector()))
        storm = Storm(nodes, proxy, ledger, session, folder / "storm.jsonl")
        await asyncio.gather(*(node.start() for node in nodes), *(node.start_agent() for node in nodes))
        await proxy.start()
        await clients.start()
        await storm.ready()
        await storm.all_up()

        clients.go()
        await asyncio.sleep(WARM_S)
        first = schedule(f"{options.seed}/1", half_s, renewals=True, reloads=reloads, upgrades=upgrades)
        await storm.run(first)
        await clients.rest(LIMIT_S * 2)
        before = await settled(session, proxy.url, proxy.pid, node_ports, rest_s)

        clients.go()
        await storm.run(schedule(f"{options.seed}/2", half_s, renewals=False, reloads=reloads))
        await asyncio.sleep(CALM_S)
        await clients.rest(LIMIT_S * 2)
        after = await settled(session, proxy.url, proxy.pid, node_ports, rest_s)
        await storm.all_up()

        broken = [*storm.violations, *grown(before, after, count, kept)]
        for url, state in (await idle_nodes(session, [node.url for node in nodes], STATE)).items():
            broken.append(f"{url} still works on {state} that nobody waits for")
        if after.hook_errors:
            broken.append(f"{after.hook_errors} exceptions in hooks")
        outcomes = [Outcome.read(line) for line in clients.outcomes.read_bytes().splitlines()]
        violations = judge(outcomes, ledger)
        await explain(session, proxy.url, violations, folder)
        proxy.signal(signal.SIGTERM)
        if (status := await proxy.ended()) != 0:
            broken.append(f"the proxy ended with status {status}")
        if "Traceback" in proxy.log.read_text():
            broken.append("there is a traceback in the proxy's log")
    texts = [*broken, *(violation.text(began_s) for violation in violations)]
    (folder / "violations.txt").write_text("\n".join(texts))
    title = f"{options.minutes:g} minutes, {options.clients} clients, {count} nodes, seed {options.seed}"
    faults: dict[str, int | str] = {**storm.done}
    faults |= {kind: "not in this build" for kind in ("reload", "upgrade") if kind not in built()}
    turned_away = sum(excused(outcome, ledger) for outcome in outcomes if outcome.end == "failed")
    covered = sum(
        bool(ledger.healthy_holder(outcome.model, outcome.sent_s, outcome.ended_s)) for outcome in outcomes
    )
    said = report(title, outcomes, faults, before, after, covered, turned_away, len(texts))
    print(said)
    if options.docs:
        renew_docs(said)
    for text in texts[:SHOWN]:
        print(f"\nVIOLATION {text}")
    return 1 if texts else 0


def renew_docs(said: str) -> None:
    """Put the figures into the documentation."""
    page = ROOT / "docs" / "operations.md"
    above, begin, rest = page.read_text().partition(BEGIN)
    _, end, below = rest.partition(END)
    page.write_text("".join((above, begin, "\n", said, "\n", end, below)))


async def explain(
    session: aiohttp.ClientSession, url: str, violations: Sequence[Violation], folder: Path
) -> None:
    """Keep what the proxy's journal says of requests that were violated."""
    with (folder / "explained.jsonl").open("wb") as out:
        for request_id in {v.outcome.request_id for v in violations if v.outcome.request_id}:
            async with session.get(f"{url}/sollol/explain/{request_id}") as answer:
                out.write(await answer.read() + b"\n")


def main() -> int:
    """Read the arguments, run, and keep the logs of a run that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--keep", action="store_true", help="keep the logs of a run without violations too")
    parser.add_argument("--docs", action="store_true", help="renew the figures in docs/operations.md")
    parser.add_argument("proxy_args", nargs="*", help="after --: more arguments of sollol proxy")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sollol-soak-"))
    status = 2
    try:
        status = asyncio.run(soak(options, folder))
    except* Broken as broken:
        print(f"VIOLATION {broken.exceptions[0]}")
        status = 1
    finally:
        if status == 0 and not options.keep:
            shutil.rmtree(folder)
        else:
            print(f"\nThe logs are in {folder}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
