"""A new process takes the port over from the old one: no connection meets a closed door.

The old one waits at a unix socket in the state directory. The new one, started beside it with the same
``--listen`` and state directory, asks there and is given the listening sockets themselves; both serve until
the new one knows its nodes and says so. Then the old one drains. Whoever of the two fails meanwhile, the
other one serves on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy_addon import sockets
from proxy_addon.sockets import Sockets, Spot

log = logging.getLogger("sollol")

FILE = "handover.sock"
ANSWER_S = 5.0  #: the old process keeps what it has learned before it answers
READY = b"ready\n"
WORD_BYTES = 64


@dataclass(slots=True)
class Inherited:
    """What another process has passed on, and the line to it."""

    sockets: Sockets
    pid: int
    line: socket.socket

    def ready(self) -> None:
        """Say that this process serves; the other one drains then. It may be gone: that is as well."""
        with contextlib.suppress(OSError):
            self.line.sendall(READY)
        self.line.close()


def ask(state_dir: Path, wanted: Iterable[Spot]) -> Inherited | None:
    """The sockets of the process that serves here, as far as they are ``wanted``; None if there is none.

    Waits for its answer, a few seconds at most. A process that listens only elsewhere is left alone.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(ANSWER_S)
    try:
        with sockets.unix_address(state_dir / FILE) as address:
            line.connect(address)
        wanted = list(wanted)
        sockets.send(line, {"wanted": wanted}, {})
        message, passed = sockets.receive(line)
    except (OSError, ValueError) as error:
        line.close()
        if not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            log.warning("The port cannot be taken over from the process that has it: %s.", error)
        return None
    if not passed:
        line.close()
        return None
    return Inherited(passed, int(message["pid"]), line)


class Offer:
    """Gives ``offered`` to whoever asks; ``save`` is called before, ``leave(pid)`` once that one serves."""

    def __init__(
        self,
        state_dir: Path,
        offered: Sockets,
        save: Callable[[], Awaitable[None]],
        leave: Callable[[int], None],
    ) -> None:
        self._path = state_dir / FILE
        self._offered = offered
        self._save, self._leave = save, leave
        self._door: socket.socket | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(self) -> None:
        """Begin, in the place of the process before. A directory that cannot be written is said once."""
        try:
            self._door = sockets.listen_unix(self._path)
        except OSError as error:
            log.warning("No later process can take the port over: %s: %s.", self._path, error.strerror)
            return
        self._go(self._answer_all(self._door))

    def close(self) -> None:
        """Give nothing more. The file stays: it is the successor's by now, or leads nowhere."""
        for task in self._tasks:
            task.cancel()
        if self._door is not None:
            self._door.close()
            self._door = None

    def _go(self, work: Any) -> None:
        task = asyncio.create_task(work, name="handover")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_all(self, door: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            line, _ = await loop.sock_accept(door)
            self._go(self._answer(line))

    async def _answer(self, line: socket.socket) -> None:
        with line:
            try:
                line.settimeout(ANSWER_S)
                asked, _ = await asyncio.to_thread(sockets.receive, line)
                wanted = {(str(host), int(port)) for host, port in asked["wanted"]}
                passed = {spot: each for spot, each in self._offered.items() if spot in wanted}
                if passed:
                    await self._save()
                await asyncio.to_thread(sockets.send, line, {"pid": os.getpid()}, passed)
                line.setblocking(False)
                word = await asyncio.get_running_loop().sock_recv(line, WORD_BYTES)
                successor = _peer_pid(line)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("A process that asked for the port was not understood: %s.", error)
                return
        if word == READY:
            self._leave(successor)
        elif passed:
            log.warning("A process that was to take the port over has ended before it could.")


def _peer_pid(line: socket.socket) -> int:
    """The process at the other end; 0 where the system does not tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return 0
    return int.from_bytes(line.getsockopt(socket.SOL_SOCKET, option, 12)[:4], "little")
