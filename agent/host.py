"""CPU, memory, disk and connections of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from agent.report import Disk, Host

_ESTABLISHED = "01"  # include/net/tcp_states.h


def established(proc_net_tcp: Iterable[str], port: int) -> int:
    """Return how many lines of ``/proc/net/tcp`` are established connections to the local ``port``."""
    ending = f":{port:04X}"
    count = 0
    for line in proc_net_tcp:
        columns = line.split(None, 4)
        if len(columns) > 3 and columns[3] == _ESTABLISHED and columns[1].endswith(ending):
            count += 1
    return count


def connections(port: int, proc: Path = Path("/proc")) -> int | None:
    """Return the number of established TCP connections to ``port`` here, None where this cannot be told.

    Other systems than Linux tell it to root alone.
    """
    counts = []
    for table in ("net/tcp", "net/tcp6"):
        with suppress(FileNotFoundError), (proc / table).open() as lines:
            counts.append(established(lines, port))
    return sum(counts) if counts else None


class HostReader:
    """Reads the host, blocking for well under a millisecond unless the disk hangs."""

    def __init__(self, store: Path | None) -> None:
        self._store = store
        psutil.cpu_percent()  # the first call has nothing to compare with and answers 0
        self._compared = False

    def read(self) -> Host:
        """Return the host as it is now; CPU utilisation is over the time since the last call."""
        memory = psutil.virtual_memory()
        busy = psutil.cpu_percent() / 100
        # A share over the instants between construction and the first reading means nothing.
        utilisation = min(busy, 1.0) if self._compared else None
        self._compared = True
        return Host(
            hostname=socket.gethostname(),
            cpu_count=os.cpu_count() or 1,
            cpu_utilisation=utilisation,
            load_1m=psutil.getloadavg()[0],
            ram_total_bytes=memory.total,
            ram_available_bytes=memory.available,
            model_store=None if self._store is None else disk(self._store),
        )


def disk(path: Path) -> Disk | None:
    """Return the file system that holds, or will hold, ``path``; None if this process may not look."""
    for place in (path, *path.parents):
        try:
            usage = psutil.disk_usage(str(place))
        except FileNotFoundError:  # not made yet: it will lie on its parent's file system
            continue
        except OSError:
            return None
        return Disk(path=str(path), total_bytes=usage.total, free_bytes=usage.free)
    return None
