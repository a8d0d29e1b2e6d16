"""A serving process between its start and its end: what signals, a changed file and a successor ask of it.

SIGTERM and SIGINT drain, the second one ends at once; SIGHUP reads the settings anew; SIGUSR2 starts a
successor, the same command with whatever is installed by now, which takes the port over once it is ready.
A signal that was ignored when the process began stays so (``nohup``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from agent import notify
from proxy_addon import defects, reload
from proxy_addon.handover import Inherited, Offer
from proxy_addon.listening import Listening
from proxy_addon.settings import Source
from proxy_addon.sockets import Sockets

if TYPE_CHECKING:
    from proxy_addon.launcher import LeanMaster

log = logging.getLogger("sollol")


def on_signals(handlers: dict[signal.Signals, Callable[[], None]]) -> None:
    """Have the running loop call ``handlers``, but for signals that are ignored."""
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, handler)


def start_successor() -> None:
    """Start this command anew, beside this process."""
    # systemd's watchdog names the process that it waits for; a successor is told to be that one.
    environ = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environ, process_group=0)
    log.info("A successor has been started: process %d.", child.pid)


class Life:
    """What the process does besides serving."""

    def __init__(
        self, lean: LeanMaster, source: Source, listening: Listening, inherited: Inherited | None = None
    ) -> None:
        self.lean = lean
        self.source = source
        self.listening = listening
        self.inherited = inherited
        self._changed = asyncio.Event()  #: the settings are to be read anew
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending = False

    def begin(self) -> None:
        """Listen for signals, and follow the file with the settings."""
        on_signals(
            {
                signal.SIGINT: self.end,
                signal.SIGTERM: self.end,
                signal.SIGHUP: self._changed.set,
                signal.SIGUSR2: start_successor,
            }
        )
        self._tasks.add(defects.keep_running("reload", self._reload_always))
        if self.source.file is not None:
            self._tasks.add(defects.keep_running("config", self._follow_file))

    async def over(self) -> None:
        """The process has served its last request."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def offer(self, sockets: Sockets) -> None:
        """It serves: let the predecessor go, and wait for a successor."""
        if self.inherited is not None:
            self.inherited.ready()
            log.info("The port was taken over from process %d.", self.inherited.pid)
        door = Offer(self.lean.sollol.settings.state_dir, sockets, self.lean.sollol.keep, self._leave)
        door.open()

    def end(self) -> None:
        """Drain; told twice, end at once."""
        if self._ending:
            self.lean.shutdown()  # type: ignore[no-untyped-call]
            return
        notify.notify("STOPPING=1")
        self._drain()

    def _leave(self, successor: int) -> None:
        if self._ending:
            return
        log.info("Process %d has taken the port over.", successor)
        notify.notify(f"MAINPID={successor}")  # systemd's word for it; elsewhere nobody listens
        self.lean.sollol.succeeded = True
        self._drain()

    def _drain(self) -> None:
        self._ending = True
        self._go(self._drained())

    async def _drained(self) -> None:
        sollol = self.lean.sollol
        await sollol.drain.wait(sollol.settings.timeouts.drain_s, self.listening.stop, sollol.succeeded)
        self.lean.shutdown()  # type: ignore[no-untyped-call]

    def _go(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work, name="life")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_always(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.lean.sollol.reloader.reload(self.source.read)

    async def _follow_file(self) -> None:
        assert self.source.file is not None
        with contextlib.suppress(ImportError):  # not on Linux: SIGHUP alone tells
            await reload.follow(self.source.file, self._changed.set)
