"""The proxy as a process: a lean Master, uvloop, a clear word before anything is started half.

mitmdump spends half of a request's time in its forty default addons; this Master has the few that a gateway
needs, and ours. Everything else is mitmproxy's own. There is no TLS: its addon would write a certificate
authority into the user's home, and end the start where there is no home, as under systemd's DynamicUser.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from proxy_addon import lean_imports  # noqa: F401  # isort: skip - before the addons of mitmproxy

import uvloop
from mitmproxy import http, master, options
from mitmproxy.addons import (
    core,
    disable_h2c,
    errorcheck,
    next_layer,
    proxyserver,
)

from proxy_addon import ports, record
from proxy_addon.chain import Sollol, mitmproxy_options
from proxy_addon.lane.front import Lane
from proxy_addon.lean_addons import LeanAddons
from proxy_addon.life import Life
from proxy_addon.listening import Listening
from proxy_addon.settings import Settings
from proxy_addon.sockets import Sockets
from proxy_addon.workers.worker import Worker


class DisableH2C(disable_h2c.DisableH2C):
    """As the parent, without its walks through the headers of every request: the record knows them."""

    def request(self, f: http.HTTPFlow) -> None:
        """Take h2c out of an upgrade."""
        rec = record.of(f)
        if rec is None or "upgrade" in rec.headers or f.request.data.method == b"PRI":
            super().request(f)  # type: ignore[no-untyped-call]


class LeanMaster(master.Master):
    """mitmproxy's Master with what a gateway needs."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        super().__init__(options.Options())
        self.addons = LeanAddons(self)
        self.sollol = Sollol(settings, worker)
        startup = errorcheck.ErrorCheck()
        # It ends the process for any error logged meanwhile; only what mitmproxy cannot do is a reason to,
        # not what its Master says of other people's tasks.
        startup.logger.addFilter(logging.Filter("mitmproxy"))
        startup.logger.addFilter(lambda logged: logged.name != "mitmproxy.master")
        server = proxyserver.Proxyserver()
        self.addons.add(  # type: ignore[no-untyped-call]
            core.Core(),
            server,
            next_layer.NextLayer(),
            DisableH2C(),
            startup,
            self.sollol,
        )
        if settings.splice:
            lane = Lane(self.addons, server, self.sollol.clients, lambda: self.sollol.settings)
            self.sollol.drain.lane = lane
            self.addons.add(lane)  # type: ignore[no-untyped-call]
        self.options.update(**mitmproxy_options(settings))


def serve(
    settings: Settings,
    sockets: Sockets,
    begin: Callable[[Life], None],
    *,
    held: bool,
    worker: Worker | None = None,
) -> int:
    """Serve ``sockets`` in this process until its end. Returns the exit status.

    ``held``: another process still serves them, so that nothing is accepted before this one is ready.
    """

    async def live() -> int:
        listening = Listening(asyncio.get_running_loop(), ports.as_bound(sockets), held)
        life = Life(LeanMaster(settings, worker), listening)
        begin(life)
        try:
            await life.lean.run()
        except SystemExit as exit_:  # mitmproxy's ErrorCheck: the sentence has been logged
            return int(exit_.code or 0)
        finally:
            await life.over()
        return 0

    with asyncio.Runner(loop_factory=_loop) as runner:
        return runner.run(live())


def _loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    make_eager = asyncio.eager_task_factory

    def factory(
        loop_: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
    ) -> asyncio.Task[Any]:
        # uvloop 0.23 forwards eager_start, which the eager factory of Python <3.13.3 does not take.
        kwargs.pop("eager_start", None)
        return make_eager(loop_, coro, **kwargs)

    # Master.run installs the factory by this name, so it must be ours by then.
    asyncio.eager_task_factory = factory  # type: ignore[assignment]
    return loop
