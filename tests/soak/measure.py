"""What a proxy at rest has: memory, files, tasks, requests; and when it has come to rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Set
from dataclasses import dataclass

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

ASK_S = 0.5  #: between two looks at processes that can only be asked
SETTLE_LIMIT_S = 30.0

#: What may be more after the storm than before, and why. A malloc arena and CPython's own do not give back
#: all that a storm took, and the journal, the learned speeds and the prefix caches are bounded but fill
#: slowly; a leak of 1 kB a request shows after 30,000 requests.
RSS_MORE_BYTES = 32 << 20
RSS_MORE_SHARE = 0.25
#: Polls keep a connection or two to each node and its agent; which of them is open at a moment varies. So do
#: those that are kept for requests, unless the rest was longer than they are kept idle.
FDS_MORE_PER_NODE = 4
KEPT_IDLE_S = 60.0  #: ``lane/pool.py``
#: Of each node's polls, up to four tasks (round, ps, tags, agent) may be under way at a look.
TASKS_MORE_PER_NODE = 4


@dataclass(frozen=True)
class Measure:
    """A proxy at one moment."""

    rss_bytes: int
    fds: int
    client_sockets: int
    node_sockets: int
    tasks: int
    open_requests: int
    in_flight: int
    queue: int
    hook_errors: int

    @property
    def at_rest(self) -> bool:
        """Whether it has nothing to do for anybody."""
        return not (self.client_sockets > 1 or self.open_requests > 1 or self.in_flight or self.queue)


def grown(before: Measure, after: Measure, nodes: int, kept: int) -> list[str]:
    """What has not come back to its base; ``kept`` connections to nodes may wait for another request."""
    rss_limit = before.rss_bytes + max(RSS_MORE_BYTES, int(before.rss_bytes * RSS_MORE_SHARE))
    other_before, other_after = before.fds - before.node_sockets, after.fds - after.node_sockets
    polls = FDS_MORE_PER_NODE * nodes
    limits = (
        ("RSS in bytes", before.rss_bytes, after.rss_bytes, rss_limit),
        ("other file descriptors", other_before, other_after, other_before + polls),
        ("connections to nodes", before.node_sockets, after.node_sockets, kept + polls),
        ("tasks", before.tasks, after.tasks, before.tasks + TASKS_MORE_PER_NODE * nodes),
        # The request and the connection that ask for the metrics are open themselves.
        ("connections of clients", before.client_sockets, after.client_sockets, 1),
        ("open requests", before.open_requests, after.open_requests, 1),
        ("requests in flight", before.in_flight, after.in_flight, 0),
        ("requests in line", before.queue, after.queue, 0),
    )
    return [f"{what}: {was} before, {now} after" for what, was, now, most in limits if now > most]


async def measure(session: aiohttp.ClientSession, url: str, pid: int, node_ports: Set[int]) -> Measure:
    """Look at the proxy once."""
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    process, port = psutil.Process(pid), int(url.rsplit(":", 1)[1])
    family_ = [process, *process.children(recursive=True)]  # --workers has some
    sockets = [each for one in family_ for each in one.net_connections("tcp")]
    return Measure(
        rss_bytes=sum(one.memory_info().rss for one in family_),
        fds=sum(one.num_fds() for one in family_),
        client_sockets=sum(
            bool(each.laddr and each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED)
            for each in sockets
        ),
        node_sockets=sum(bool(each.raddr and each.raddr.port in node_ports) for each in sockets),
        tasks=int(sums["sollol_tasks"]),
        open_requests=int(sums["sollol_requests_open"]),
        in_flight=int(sums.get("sollol_requests_in_flight", 0)),
        queue=int(sums.get("sollol_queue_depth", 0)),
        hook_errors=int(sums.get("sollol_hook_errors_total", 0)),
    )


async def settled(
    session: aiohttp.ClientSession, url: str, pid: int, node_ports: Set[int], rest_s: float
) -> Measure:
    """The proxy once it is at rest, or a limit has passed; of tasks and files the fewest of some looks."""
    await asyncio.sleep(rest_s)
    deadline_s = time.monotonic() + SETTLE_LIMIT_S
    looks: list[Measure] = []
    while len(looks) < 6 and time.monotonic() < deadline_s:
        now = await measure(session, url, pid, node_ports)
        looks = [*looks, now] if now.at_rest else [now]
        await asyncio.sleep(ASK_S)
    last = looks[-1]
    fewest = {name: min(getattr(look, name) for look in looks) for name in ("fds", "node_sockets", "tasks")}
    return Measure(**{**vars(last), **fewest})


async def idle_nodes(session: aiohttp.ClientSession, urls: Iterable[str], path: str) -> dict[str, str]:
    """The nodes that are still working on something, asked until none is or a limit has passed."""
    deadline_s, waiting = time.monotonic() + SETTLE_LIMIT_S, dict.fromkeys(urls, "")
    while waiting and time.monotonic() < deadline_s:
        for url in list(waiting):
            async with session.get(url + path) as answer:
                state = await answer.json()
            if any(state.values()):
                waiting[url] = str(state)
            else:
                del waiting[url]
        if waiting:
            await asyncio.sleep(ASK_S)
    return waiting
