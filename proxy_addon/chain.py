"""The addons, in the order in which a request meets them: the map of the house.

    client ──► Intake ─ Guard ─ Admin ─ Understand ─ Door ─── OneServer ─── Route ──► node
                 │        │       │         │          │          │           │
              record   may it?  ours?  what is it?  how urgent?  the fleet's  wait in line,
                                                                              decide, point
                                                                              │
    client ◄── Answer ◄── (Failover: another node, while nothing was sent) ◄── node
                 └─► Epilogue: learning, journal, metrics

Everything that decides is a pure function elsewhere (``placement/``, ``admission/line.py``, ``retry.py``,
``relay.py``, ``access.py``, ``one_server/catalog.py``); everything that must act on bytes is in
``lane/`` and ``http_stream.py``.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp
from mitmproxy import ctx
from mitmproxy.addonmanager import Loader

from agent import notify
from proxy_addon import defects
from proxy_addon.admin import Admin
from proxy_addon.admission.addon import Door
from proxy_addon.answer import Answer
from proxy_addon.clients import Clients
from proxy_addon.dispatch import Dispatch
from proxy_addon.drain import Drain
from proxy_addon.epilogue import Epilogue
from proxy_addon.failover import Failover
from proxy_addon.fleet.discovery import Discovery
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, names
from proxy_addon.fleet.probe import Prober
from proxy_addon.fleet.watch import Watch
from proxy_addon.guard import Guard
from proxy_addon.intake import Intake, Understand
from proxy_addon.journal import Journal
from proxy_addon.layers import Layers
from proxy_addon.one_server.addon import OneServer
from proxy_addon.placement.calibration import observe_sizes
from proxy_addon.plans import Plans
from proxy_addon.protect import protect
from proxy_addon.reload import FIXED, Live, Reloader
from proxy_addon.replicas.hands import Hands
from proxy_addon.replicas.keeper import Keeper
from proxy_addon.replicas.snapshot import in_line
from proxy_addon.retry import Budget
from proxy_addon.route import Route
from proxy_addon.second_thoughts import SecondThoughts
from proxy_addon.settings import Address, Settings
from proxy_addon.telemetry import Telemetry
from proxy_addon.timeouts import Timeouts
from proxy_addon.workers.worker import Worker

log = logging.getLogger("sollol")

SAVE_EVERY_S = 30.0  #: learned speeds are written so often; a crash loses at most that much


def mitmproxy_options(settings: Settings) -> dict[str, Any]:
    """The options of mitmproxy that a gateway needs."""
    listen = settings.listen
    return {
        # A reverse target must be named; connections are lazy and every request is given a node.
        # An IPv6 address stands without brackets in mitmproxy's modes.
        "mode": [f"reverse:http://sollol.invalid:11434@{listen.host}:{listen.port}", *settings.modes],
        **required_options(),
    }


def required_options() -> dict[str, Any]:
    """Those that the chain relies on, whoever launched it."""
    return {
        "connection_strategy": "lazy",
        "keep_host_header": True,  # the guard checks the client's Host; dispatch sets the node's
        "tcp_timeout": 86400,  # would end silent upstreams (a long load); timeouts.py has limits of its own
        "rawtcp": False,
        "http2": False,
        "websocket": False,
        "validate_inbound_headers": True,
    }


class Sollol:
    """The whole proxy as one mitmproxy addon."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        self.settings = settings
        self.worker = worker = worker or Worker()
        self.clients = Clients(lambda: self.settings.guard.max_connections)
        self.fleet = Fleet()
        self.speeds = Speeds.load(worker.known_speeds(settings.state_dir))
        self.journal = Journal(settings.state_dir / "journal")
        self.telemetry = Telemetry(self.fleet)
        self.reloader = Reloader(settings, self.reconfigure, self.telemetry.reloaded)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.on_ready: Callable[[], None] = lambda: None
        self.succeeded = False  #: another process has taken over, which learns from now on
        self._saves = True  #: the last time that speeds were written, they could be
        self.ready = asyncio.Event()  #: every node was looked at once

        plans = Plans(
            self.journal.plans, (self.journal.planned, self.telemetry.planned), self.journal.planned
        )
        self.fleet.on_news += [plans.look, partial(observe_sizes, speeds=self.speeds)]

        guard = Guard(settings, self.fleet, worker.proxy_id)
        self.watch = Watch(self.fleet, settings, self.session, guard.proxy_id)
        self.discovery = Discovery(self.fleet, settings)
        self.discovery.on_found = self.watch.follow
        self.dispatch = Dispatch(self.fleet, self.speeds, settings, _now, guard.stamp, self.telemetry.refused)
        self.telemetry.depth = self.dispatch.admission.line.depth
        hands = Hands(
            self.fleet,
            self.speeds,
            settings,
            self.session,
            _now,
            guard.stamp,
            self.watch.refresh_resident,
        )
        self.keeper = Keeper(
            hands,
            self.dispatch.rules,
            _now,
            self.journal.note,
            self.telemetry.replica_acted,
            partial(in_line, self.dispatch.admission),
            acts=worker.first,
        )
        self.prober = Prober(self.fleet, self.speeds, self.session, _now, guard.stamp, self.journal.note)
        self.telemetry.probes = self.prober.outcomes
        budget = Budget.of(settings)
        one_server = OneServer(
            self.fleet,
            settings,
            self.session,
            self.watch.refresh,
            self.dispatch.send,
            self.watch.refresh_resident,
        )
        timeouts = Timeouts(self.dispatch, settings.timeouts)
        self.drain = Drain(timeouts.abort_all)
        self.telemetry.under_way = self.drain.under_way
        self.telemetry.tasks = lambda: len(asyncio.all_tasks())
        admin = Admin(self.fleet, self.journal, self.telemetry, self.dispatch, self.reloader, worker)
        self.siblings = admin.siblings
        chain: tuple[object, ...] = (
            Layers(settings, self.clients),
            Intake(settings, _now),
            guard,
            self.drain,
            admin,
            Understand(self.ready),
            Door(settings, _now, self.dispatch.refuse),
            one_server,
            self.keeper,
            Route(self.dispatch, one_server, budget),
            Failover(self.dispatch, budget, self.watch.suspect, self.telemetry.retried),
            SecondThoughts(self.dispatch, timeouts.take_back),
            timeouts,
            Answer(_now),
            Epilogue(
                self.dispatch,
                self.watch.suspect,
                (self.journal.add, self.telemetry.observe, self.keeper.observe),
            ),
        )
        parts = (*chain, budget, self.dispatch, hands, self.watch, self.discovery)
        self._live = [part for part in parts if isinstance(part, Live)]
        self.addons = [protect(addon, self.telemetry.hook_failed, self.dispatch.sent_by) for addon in chain]

    def reconfigure(self, settings: Settings) -> None:
        """Go by ``settings`` from now on: every part at the same moment, for nothing here waits."""
        settings = settings.model_copy(update={name: getattr(self.settings, name) for name in FIXED})
        self.settings = settings
        for part in self._live:
            part.reconfigure(settings)

    def session(self) -> aiohttp.ClientSession:
        """The one HTTP session for polls and fan-outs."""
        if self._session is None:
            # No limit: a pull may take hours and must not keep the polls from a connection.
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=30)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        return self._session

    def load(self, loader: Loader) -> None:
        """Set what the chain relies on, also when it was loaded into somebody's mitmdump."""
        ctx.options.update(**required_options())

    async def running(self) -> None:
        """The ports are open: find the nodes, look at each once, then say so."""
        defects.listen(self.telemetry.hook_failed)
        try:
            await self._start()
        except Exception:
            log.exception("SOLLOL cannot start")
            sys.exit(1)  # as mitmproxy's own ErrorCheck does: half a proxy would keep its clients waiting

    async def _start(self) -> None:
        await self.discovery.start()
        self.watch.start()
        self._tasks = [
            defects.keep_running("announce", self._announce),
            defects.keep_running("watchdog", notify.keep_watchdog_fed),
            defects.keep_running("save", self._save_always),
        ]

    async def _announce(self) -> None:
        await self.watch.looked()
        now_s = _now()
        if not self.ready.is_set():
            self.ready.set()
            self.keeper.start()
            if self.worker.first:
                self.prober.start()
            await self.siblings.start()
        up, all_nodes = self.fleet.up(now_s), list(self.fleet)
        models = {key for node in up for key in node.models}
        where = ", ".join(str(Address(host=host, port=port)) for host, port, *_ in _listening())
        log.info(
            "%s: %d of %d nodes up (%s), %d models",
            f"SOLLOL listens on {where}" if self.worker.of == 1 else "ready",
            len(up),
            len(all_nodes),
            names(up),
            len(models),
        )
        notify.notify(f"READY=1\nSTATUS={len(up)} of {len(all_nodes)} nodes up")
        self.on_ready()

    async def _save_always(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await asyncio.to_thread(self._save)

    async def keep(self) -> None:
        """Have all on disk that a successor begins with."""
        await asyncio.to_thread(self._save)
        await self.journal.keep()

    def _save(self) -> None:
        """Keep what was learned. A disk that refuses is said once; nothing else ends with it."""
        if self.succeeded:
            return
        try:
            self.speeds.save(self.worker.speeds(self.settings.state_dir))
        except OSError as error:
            if self._saves:
                log.warning("Learned speeds cannot be kept: %s.", error)
            self._saves = False
        else:
            self._saves = True

    async def done(self) -> None:
        """Stop what runs, keep what was learned."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.keeper.stop()
        await self.prober.stop()
        await self.siblings.stop()
        await self.discovery.stop()
        await self.watch.stop()
        await self.journal.close()
        self._save()
        if self._session is not None:
            await self._session.close()
            self._session = None


def _listening() -> list[Any]:
    return list(ctx.master.addons.get("proxyserver").listen_addrs())


def _now() -> float:
    return asyncio.get_running_loop().time()
