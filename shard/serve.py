"""Puts a coordinator together: its models, the agents, the fleet's certificates, its report, and the API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from yarl import URL

from agent import join, llama_cpp, notify, pki, state
from agent.announce import announceable, announced
from agent.report import Ollama, Shard, ShardModel
from agent.server import report_routes
from shard.agents import Agents
from shard.coordinator import Coordinator
from shard.metrics import collector
from shard.models import Models
from shard.node import Node
from shard.options import DEFAULT_NUM_CTX
from shard.plan_journal import PlanJournal
from shard.reporter import LocalMachine, OwnReport, own_ollama
from shard.runners import Runners
from shard.server import OLLAMA_API_VERSION, ps_row, serve

log = logging.getLogger(__name__)

#: What each model may expect is worked out anew when an agent has news, and so often besides.
EXPECT_EVERY_S = 30.0
#: Memory is the limit of a coordinator, not the number of models.
MAX_LOADED = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """What a coordinator is told when it is started."""

    host: str
    port: int
    state_dir: Path
    agents: Sequence[str] = ()
    threads: int = 0
    parallel: int = 1
    lends_bytes: int | None = None  #: the most that models may take of this machine; None: what is free
    mdns: bool = True
    origins: Sequence[str] = ()  #: web pages that may ask, besides Ollama's defaults


async def run(models: Models, settings: Settings, listening: Callable[[str, int], Awaitable[None]]) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises OSError if the address is taken, LlamaServerError without a llama-server, PkiError for broken
    certificates.
    """
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with AsyncExitStack() as stack:
        node_id = state.node_id(settings.state_dir)
        local = LocalMachine(node_id, lends_bytes=settings.lends_bytes)
        coordinator = await start_coordinator(stack, settings, local)
        runners = Runners(coordinator.start, MAX_LOADED, revive=True)
        node = Node(models, runners, settings.parallel, settings.threads, coordinator)
        expectations = Expectations(node)
        url = URL.build(scheme="http", host=settings.host, port=settings.port)

        def say() -> tuple[Ollama, Shard]:
            rows = [model.tag_row() for model in models]
            loaded = [ps_row(node, runner) for runner in runners.loaded()]
            shard = Shard(
                models=expectations.latest,
                loads=coordinator.loads(),
                plans=list(coordinator.journal.latest),
            )
            return own_ollama(str(url), OLLAMA_API_VERSION, rows, loaded, settings.parallel), shard

        async def bound(host: str, port: int) -> None:
            nonlocal url
            url = url.with_port(port)
            if settings.mdns:
                await _announce(stack, node_id, host, port)
            notify.notify("READY=1")
            await listening(host, port)

        routes: list[web.RouteDef] = [
            *report_routes(OwnReport(local, say), more=collector(coordinator, node)),
            web.post(join.PATH, join.handler(settings.state_dir)),
        ]
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("sample", local.run()),
                ("expect", expectations.run()),
                ("watchdog", notify.keep_watchdog_fed()),
            )
        ]
        try:
            await serve(node, settings.host, settings.port, stop, bound, routes, settings.origins)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def start_coordinator(stack: AsyncExitStack, settings: Settings, local: LocalMachine) -> Coordinator:
    """Return a coordinator whose agents have been asked once. Raises PkiError for broken certificates."""
    member = pki.identity(settings.state_dir)
    context = pki.client_context(settings.state_dir) if member else None
    if member is not None and member.role != "coordinator":
        raise pki.PkiError(
            f"{member.name} joined its fleet as an {member.role} alone; to coordinate, it joins by "
            "`sollol shard join` with a token of `sollol shard init --for coordinator`"
        )
    agents = Agents(settings.agents, mdns=settings.mdns and member is not None)
    stack.push_async_callback(agents.close)
    # llama-server is looked for once and then known: not on the loop, where plans ask for its build.
    await asyncio.gather(local.first(), agents.start(), asyncio.to_thread(llama_cpp.program, "llama-server"))
    journal = PlanJournal(settings.state_dir / "plans.jsonl")
    return Coordinator(agents, local, context, journal)


async def _announce(stack: AsyncExitStack, node_id: str, host: str, port: int) -> None:
    addresses = announceable([host])
    if not addresses:
        return  # it listens on loopback alone
    try:
        await stack.enter_async_context(
            announced(
                # An agent on the same machine announces itself by the id of the same state directory.
                node_id=f"{node_id}-shard",
                kind="shard",
                addresses=addresses,
                agent_port=port,
                ollama_port=port,
            )
        )
    except OSError as error:
        log.warning("this coordinator is not announced on the network: mDNS: %s", error)


class Expectations:
    """What every model would get if it were asked for, kept for the report."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.latest: list[ShardModel] = []

    async def run(self) -> None:
        """Work them out again and again until cancelled, one at a time."""
        coordinator = self._node.coordinator
        assert coordinator is not None
        while True:
            await self._node.models.refresh()
            models = list(self._node.models)
            found: list[ShardModel] = []
            for model in models:
                found.append(
                    await coordinator.surveyor.expectation(model, DEFAULT_NUM_CTX, self._node.parallel)
                )
                # Over the first round what is known is told as it comes.
                self.latest = found if len(found) > len(self.latest) else self.latest
            self.latest = found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXPECT_EVERY_S):
                    await coordinator.agents.news.wait()
            coordinator.agents.news.clear()
