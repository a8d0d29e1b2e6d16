"""The proxy as a process: a lean Master, uvloop, a clear word before anything is started half.

mitmdump spends half of a request's time in its forty default addons; this Master has the few that a gateway
needs, and ours. Everything else is mitmproxy's own. There is no TLS: its addon would write a certificate
authority into the user's home, and end the start where there is no home, as under systemd's DynamicUser.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

import uvloop
from mitmproxy import master, options
from mitmproxy.addons import (
    core,
    disable_h2c,
    errorcheck,
    next_layer,
    proxyserver,
)

from agent import notify
from proxy_addon.chain import Sollol, mitmproxy_options
from proxy_addon.fleet.discovery import port_conflict
from proxy_addon.lean_addons import LeanAddons
from proxy_addon.settings import Settings

log = logging.getLogger("sollol")

#: Connections that may wait to be accepted. mitmproxy leaves it at asyncio's 100: of a burst beyond that each
#: is dropped without a word, and tried anew by its client's kernel a second later, then three, then seven.
BACKLOG = 4096


class LeanMaster(master.Master):
    """mitmproxy's Master with what a gateway needs."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(options.Options())
        self.addons = LeanAddons(self)
        self.sollol = Sollol(settings)
        startup = errorcheck.ErrorCheck()
        # It ends the process for any error logged meanwhile; only what mitmproxy cannot do is a reason to.
        startup.logger.addFilter(logging.Filter("mitmproxy"))
        self.addons.add(  # type: ignore[no-untyped-call]
            core.Core(),
            proxyserver.Proxyserver(),
            next_layer.NextLayer(),
            disable_h2c.DisableH2C(),
            startup,
            self.sollol,
        )
        self.options.update(**mitmproxy_options(settings))


def run(settings: Settings) -> int:
    """Run the proxy until SIGINT or SIGTERM. Returns the exit status: 0, or 1 where it could not listen."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    log.setLevel(logging.INFO)
    logging.getLogger("proxy_addon").setLevel(logging.INFO)
    conflict = port_conflict(settings.listen.host, settings.listen.port)
    if conflict is not None:
        print(f"sollol proxy: {conflict}", file=sys.stderr)  # noqa: T201
        return 1
    with asyncio.Runner(loop_factory=_loop) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    lean = LeanMaster(settings)
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        notify.notify("STOPPING=1")
        await lean.sollol.drain.wait(settings.timeouts.drain_s)
        lean.shutdown()  # type: ignore[no-untyped-call]

    def told_to_end() -> None:
        if ending:
            lean.shutdown()  # type: ignore[no-untyped-call]  # the second time: at once
        else:
            ending.append(asyncio.create_task(end(), name="drain"))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP for good
            loop.add_signal_handler(number, told_to_end)
    try:
        await lean.run()
    except SystemExit as exit_:  # mitmproxy's ErrorCheck: the sentence has been logged
        return int(exit_.code or 0)
    return 0


def _loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    loop.create_server = partial(loop.create_server, backlog=BACKLOG)  # type: ignore[method-assign]
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
