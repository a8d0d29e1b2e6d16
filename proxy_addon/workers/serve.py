"""One worker: ``python -m proxy_addon.workers.serve FD``, with the line to its parent at ``FD``."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from typing import TYPE_CHECKING

from proxy_addon import launcher, ports, start
from proxy_addon import sockets as passing
from proxy_addon.reload import Outcome
from proxy_addon.workers.crew import unpacked
from proxy_addon.workers.worker import Worker

if TYPE_CHECKING:
    from proxy_addon.life import Life

READY = b"ready\n"
LONGEST_BYTES = 16 << 20  #: of a message: settings with thousands of nodes


def main(descriptor: int) -> int:
    """Serve until the parent says so or is gone; the exit status."""
    for number in (signal.SIGHUP, signal.SIGUSR2):  # the parent's affair
        signal.signal(number, signal.SIG_IGN)
    line = socket.socket(fileno=descriptor)
    told, sockets = passing.receive(line)
    worker = Worker(told["number"], told["of"], told["family"])
    start.log_to_stderr(f"worker {worker.number}: ")
    ports.raise_descriptor_limit()
    last = Outcome(**told["outcome"]) if told["outcome"] is not None else None

    def begin(life: Life) -> None:
        life.lean.sollol.reloader.last = last
        life.lean.sollol.on_ready = lambda: life.go(_serve(life, line))
        life.go(_obey(life, line))

    settings, held = unpacked(told["settings"]), told["held"]
    return launcher.serve(settings, sockets, begin, held=held, worker=worker)


async def _serve(life: Life, line: socket.socket) -> None:
    life.listening.serve()
    line.sendall(READY)


async def _obey(life: Life, line: socket.socket) -> None:
    """Do what the parent says; drain when it is gone."""
    line.setblocking(False)
    reader, _ = await asyncio.open_connection(sock=line.dup(), limit=LONGEST_BYTES)
    sollol = life.lean.sollol
    async for row in reader:
        match json.loads(row):
            case {"do": "reload", "settings": settings}:
                sollol.reconfigure(unpacked(settings))
            case {"do": "told", "outcome": outcome}:
                sollol.reloader.tell(Outcome(**outcome))
            case {"do": "keep"}:
                life.go(sollol.keep())
            case {"do": "drain", "succeeded": succeeded}:
                life.drain(succeeded=succeeded)
            case {"do": "end"}:
                life.end_now()
    life.drain(succeeded=False)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
