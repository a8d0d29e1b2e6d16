"""The parent of several workers: it binds the ports, keeps the workers running, and reads the settings.

Each worker has listening sockets of its own, which the parent holds as well: of a worker that dies only what
it carried is lost, and who has connected to it meanwhile is served by its successor. Parent and worker talk
over a pair of sockets; either sees at once that the other one is gone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

from agent import notify
from proxy_addon import defects, ports
from proxy_addon import sockets as passing
from proxy_addon.handover import Inherited, Offer
from proxy_addon.life import follow_file, on_signals, start_successor
from proxy_addon.reload import FIXED, Outcome, Reloader
from proxy_addon.settings import Address, Settings, Source
from proxy_addon.sockets import Sockets
from proxy_addon.workers.worker import Worker

log = logging.getLogger("sollol")

PAUSE_S, PAUSE_MAX_S = 0.5, 30.0  #: until a worker that has ended is started again; doubled each time
LIVED_S = 60.0  #: one that has run for so long is started again at once
OVERTIME_S = 10.0  #: a worker that has not drained so long after its limit is killed
#: What concerns the parent alone: a worker that told systemd something would not be listened to.
PARENT_ONLY = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def packed(settings: Settings) -> str:
    """``settings`` for a worker, with the secrets in them; see :func:`unpacked`."""
    return base64.b64encode(pickle.dumps(settings)).decode()


def unpacked(text: str) -> Settings:
    """What the parent has packed: it comes over a pair of sockets that nobody else has."""
    settings: Settings = pickle.loads(base64.b64decode(text))
    return settings


class Crew:
    """The workers of one proxy."""

    def __init__(
        self, settings: Settings, source: Source, sockets: Sockets, inherited: Inherited | None
    ) -> None:
        self.settings = settings
        self.source = source
        self.sockets = sockets
        self.inherited = inherited
        self.family = Worker().family
        self.reloader = Reloader(settings, self._reconfigure, on_outcome=self._outcome)
        self.status = 0  #: to exit with
        self._lines: dict[int, socket.socket] = {}  #: to the workers that run
        self._ready: set[int] = set()
        self._told = False  #: to end, by a signal
        self._up = False  #: all were ready at once
        self._ending = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Until told to end; the exit status."""
        on_signals(
            {
                signal.SIGINT: self.end,
                signal.SIGTERM: self.end,
                signal.SIGHUP: self._changed.set,
                signal.SIGUSR2: start_successor,
            }
        )
        beside = [
            defects.keep_running("reload", partial(self.reloader.follow, self.source.read, self._changed)),
            defects.keep_running("watchdog", notify.keep_watchdog_fed),
        ]
        if self.source.file is not None:
            follow = partial(follow_file, self.source.file, self._changed.set)
            beside.append(defects.keep_running("config", follow))
        await asyncio.gather(*(self._keep(number) for number in range(1, self.settings.workers + 1)))
        for task in (*beside, *self._tasks):
            task.cancel()
        await asyncio.gather(*beside, *self._tasks, return_exceptions=True)
        return self.status

    def end(self) -> None:
        """Have all drain; told twice, end at once."""
        if self._told:
            self._say({"do": "end"})
            return
        self._told = True
        notify.notify("STOPPING=1")
        if not self._ending.is_set():
            self._drain(succeeded=False)

    def _leave(self, successor: int) -> None:
        if not self._ending.is_set():
            log.info("Process %d has taken the port over.", successor)
            notify.notify(f"MAINPID={successor}")
            self._drain(succeeded=True)

    def _drain(self, *, succeeded: bool) -> None:
        self._ending.set()
        self._say({"do": "drain", "succeeded": succeeded})
        passing.close_all(self.sockets)

    def _say(self, message: dict[str, Any]) -> None:
        for number in list(self._lines):
            self._say_to(number, message)

    def _say_to(self, number: int, message: dict[str, Any]) -> None:
        try:
            self._lines[number].sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:  # it has ended, which is seen elsewhere
            log.debug("worker %d does not listen: %s", number, error)

    # -- settings -------------------------------------------------------------------------------------

    def _reconfigure(self, settings: Settings) -> None:
        fixed = {name: getattr(self.settings, name) for name in FIXED}
        self.settings = settings.model_copy(update=fixed)
        self._say({"do": "reload", "settings": packed(self.settings)})

    def _outcome(self, outcome: Outcome) -> None:
        self._say({"do": "told", "outcome": outcome.as_json()})

    # -- workers --------------------------------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Keep worker ``number`` running."""
        loop, pause_s = asyncio.get_running_loop(), PAUSE_S
        while not self._ending.is_set():
            begun_s = loop.time()
            status = await self._run(number)
            if self._ending.is_set():
                return
            if not self._up:
                log.error("Worker %d has ended with status %d before all were ready.", number, status)
                self.status = 1
                self._drain(succeeded=False)
                return
            pause_s = 0.0 if loop.time() - begun_s >= LIVED_S else max(PAUSE_S, min(2 * pause_s, PAUSE_MAX_S))
            log.warning(
                "Worker %d has ended with status %d; it is started again in %g s.", number, status, pause_s
            )
            try:
                async with asyncio.timeout(pause_s):
                    await self._ending.wait()
            except TimeoutError:
                continue

    async def _run(self, number: int) -> int:
        """Run worker ``number`` to its end; its exit status."""
        ours, its = socket.socketpair()
        environ = {name: value for name, value in os.environ.items() if name not in PARENT_ONLY}
        with ours, its:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-OO", "-m", "proxy_addon.workers.serve", str(its.fileno()),
                pass_fds=(its.fileno(),), env=environ, process_group=0, stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            its.close()
            last = self.reloader.last
            message = {
                "number": number,
                "of": self.settings.workers,
                "family": self.family,
                "settings": packed(self.settings),
                "held": self.inherited is not None and not self._up,
                "outcome": last.as_json() if last is not None else None,
            }
            if self._ending.is_set():
                process.kill()
                return await process.wait()
            passing.send(ours, message, ports.share(self.sockets, number, self.settings.workers))
            self._lines[number] = ours
            self._go(self._hear(number, ours))
            try:
                return await self._until_ended(process)
            finally:
                del self._lines[number]
                self._ready.discard(number)

    async def _until_ended(self, process: asyncio.subprocess.Process) -> int:
        ended = asyncio.ensure_future(process.wait())
        ending = asyncio.ensure_future(self._ending.wait())
        await asyncio.wait({ended, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not ended.done():
            limit_s = self.settings.timeouts.drain_s + OVERTIME_S
            await asyncio.wait({ended}, timeout=limit_s)
            if not ended.done():
                process.kill()
        return await ended

    async def _hear(self, number: int, line: socket.socket) -> None:
        """A worker says one thing: that it serves."""
        listener = line.dup()
        listener.setblocking(False)
        with listener:
            word = await asyncio.get_running_loop().sock_recv(listener, 64)
        if not word or self._lines.get(number) is not line:
            return
        self._ready.add(number)
        if len(self._ready) == self.settings.workers and not self._up:
            self._up = True
            self._all_ready()

    def _all_ready(self) -> None:
        spots = dict.fromkeys(
            str(Address(host=one.getsockname()[0], port=one.getsockname()[1]))
            for each in self.sockets.values()
            for one in each
        )
        log.info("SOLLOL listens on %s: %d workers", ", ".join(spots), self.settings.workers)
        notify.notify(f"READY=1\nSTATUS={self.settings.workers} workers")
        if self.inherited is not None:
            self.inherited.ready()
            log.info("The port was taken over from process %d.", self.inherited.pid)
        Offer(self.settings.state_dir, self.sockets, self._kept, self._leave).open()

    async def _kept(self) -> None:
        """Have the workers write what they have learned: they are done before a successor's have started."""
        self._say({"do": "keep"})

    def _go(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work, name="worker")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run(settings: Settings, source: Source, sockets: Sockets, inherited: Inherited | None) -> int:
    """Run the proxy as ``settings.workers`` processes; the exit status."""

    async def crew() -> int:
        bound = ports.bound_to(settings, sockets)
        made = Crew(bound, source, sockets, inherited)
        made.reloader.settings = settings
        return await made.run()

    return asyncio.run(crew())
