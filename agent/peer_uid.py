"""Which user is at the other end of a connection over loopback.

A port on loopback is open to every user of the machine. Where what listens there knows no login, the kernel's
table of connections tells whose each one is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

_CONNECTIONS = Path("/proc/net/tcp")
LOOKS = 10


def is_foreign(peer: tuple[str, int], here: tuple[str, int]) -> bool:
    """Whether the IPv4 connection from ``peer`` to ``here`` is another user's; False where nobody can tell.

    The table is read in pieces, and a row that moves meanwhile may be missed. One that is not seen in
    :data:`LOOKS` is not taken for our own.
    """
    for _ in range(LOOKS):
        try:
            with _CONNECTIONS.open() as rows:
                uid = uid_of(peer, here, rows)
        except OSError:  # not Linux
            return False
        if uid is not None:
            return uid != os.geteuid()
    return True


def uid_of(local: tuple[str, int], remote: tuple[str, int], rows: Iterable[str]) -> int | None:
    """Return whose socket has these two ends, from the rows of /proc/net/tcp (proc_net_tcp.txt).

    Both ends: one local port may serve several connections, some of them long closed, and those have no user.
    """
    wanted = [_printed(local), _printed(remote)]
    for row in rows:
        fields = row.split()
        if len(fields) > 7 and fields[1:3] == wanted:
            return int(fields[7])
    return None


def _printed(end: tuple[str, int]) -> str:
    # The address is printed as the machine's own integer, which on all that SOLLOL runs on is little-endian.
    return f"{int.from_bytes(socket.inet_aton(end[0]), 'little'):08X}:{end[1]:04X}"
