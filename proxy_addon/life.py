"""A serving process between its start and its end: what signals, a changed file and a successor ask of it.

SIGTERM and SIGINT drain, the second one ends at once; SIGHUP reads the settings anew; SIGUSR2 starts a
successor, the same command with whatever is installed by now, which takes the port over once it is ready.
A signal that was ignored when the process began stays so (``nohup``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
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


async def follow_file(path: Path, on_change: Callable[[], None]) -> None:
    """See :func:`reload.follow`; where the file cannot be followed SIGHUP alone tells."""
    try:
        await reload.follow(path, on_change)
    except ImportError:  # not on Linux
        return
    except OSError as error:
        log.warning("Changes of %s are not followed (%s); SIGHUP has it read anew.", path, error.strerror)


class Life:
    """What the process does besides serving."""

    def __init__(self, lean: LeanMaster, listening: Listening) -> None:
        self.lean = lean
        self.listening = listening
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending = False
        self._told = False  #: by a signal: a drain may also have begun because of a successor
        on_signals({signal.SIGINT: self.end, signal.SIGTERM: self.end})

    async def over(self) -> None:
        """The process has served its last request."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def by_itself(self, source: Source, sockets: Sockets, inherited: Inherited | None) -> None:
        """Without a parent: read the settings anew when told to, take ``sockets`` over and pass them on."""
        changed = asyncio.Event()
        on_signals({signal.SIGHUP: changed.set, signal.SIGUSR2: start_successor})
        reloader = self.lean.sollol.reloader
        self._tasks.add(defects.keep_running("reload", partial(reloader.follow, source.read, changed)))
        if source.file is not None:
            follow = partial(follow_file, source.file, changed.set)
            self._tasks.add(defects.keep_running("config", follow))
        self.lean.sollol.on_ready = lambda: self.go(self._serve(sockets, inherited))

    async def _serve(self, sockets: Sockets, inherited: Inherited | None) -> None:
        self.listening.serve()
        if inherited is not None:
            inherited.ready()
            log.info("The port was taken over from process %d.", inherited.pid)
        Offer(self.lean.sollol.settings.state_dir, sockets, self.lean.sollol.keep, self._leave).open()

    def _leave(self, successor: int) -> None:
        if not self._ending:
            log.info("Process %d has taken the port over.", successor)
            notify.notify(f"MAINPID={successor}")  # systemd's word for it; elsewhere nobody listens
            self.drain(succeeded=True)

    def end(self) -> None:
        """Drain; told twice, end at once."""
        if self._told:
            self.end_now()
        else:
            self._told = True
            notify.notify("STOPPING=1")
            self.drain(succeeded=False)

    def end_now(self) -> None:
        """End at once."""
        self.lean.shutdown()  # type: ignore[no-untyped-call]

    def drain(self, *, succeeded: bool) -> None:
        """Serve what has come, then end; ``succeeded``: another process serves the ports by now."""
        if not self._ending:
            self._ending = True
            self.lean.sollol.succeeded = succeeded
            self.go(self._drained())

    async def _drained(self) -> None:
        sollol = self.lean.sollol
        limit_s = sollol.settings.timeouts.drain_s
        await sollol.drain.wait(limit_s, self.listening.stop, sollol.succeeded)
        self.end_now()

    def go(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do ``work`` beside."""
        task = asyncio.create_task(work, name="life")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
