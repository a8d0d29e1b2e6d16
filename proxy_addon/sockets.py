"""Listening sockets as things of their own: bound once, shared out, and passed from process to process.

A socket that is passed on keeps its queue: what a client has connected to while nobody accepted is served by
whoever holds the socket next. All are bound with SO_REUSEPORT, so that several processes of one user can each
have their own at one address, between which the kernel spreads connections.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import O_DIRECTORY, O_RDONLY, close, fsencode, getpid
from os import open as open_fd
from pathlib import Path
from typing import Any

from mitmproxy.proxy import mode_specs

from proxy_addon.settings import Settings

#: Connections that may wait to be accepted. mitmproxy leaves it at asyncio's 100: of a burst beyond that each
#: is dropped without a word, and tried anew by its client's kernel a second later, then three, then seven.
BACKLOG = 4096
MAX_DESCRIPTORS = 253  #: in one message (Linux: SCM_MAX_FD)
MAX_UNIX_PATH_BYTES = 100  #: of a socket's address (Linux has room for 108, macOS for 104)

Spot = tuple[str, int]  #: host and port as they were asked for: "" is every interface, port 0 any
Sockets = dict[Spot, list[socket.socket]]


def spots(settings: Settings) -> list[Spot]:
    """Where ``settings`` want to listen, as mitmproxy's modes will ask for it."""
    modes = [mode_specs.ProxyMode.parse(mode) for mode in settings.modes]
    tcp = [mode for mode in modes if mode.transport_protocol == "tcp"]
    return [
        (settings.listen.host, settings.listen.port),
        *((mode.listen_host(), port) for mode in tcp if (port := mode.listen_port()) is not None),
    ]


def bind(spot: Spot) -> list[socket.socket]:
    """Sockets that listen at ``spot``, one for each of its addresses, as asyncio would. Raises OSError."""
    host, port = spot
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            bound.append(one := socket.socket(family, kind, protocol))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            port = one.getsockname()[1]  # of port 0 the first address chooses for all
            one.setblocking(False)
            one.listen(BACKLOG)
    except OSError:
        for one in bound:
            one.close()
        raise
    return bound


def again(bound: list[socket.socket]) -> list[socket.socket]:
    """Further sockets at the addresses of ``bound``. Raises OSError."""
    return [twin for one in bound for twin in bind(one.getsockname()[:2])]


def send(to: socket.socket, message: dict[str, Any], sockets: Sockets) -> None:
    """Send ``message``, and ``sockets`` with it."""
    table = [[*spot, len(each)] for spot, each in sockets.items()]
    line = json.dumps(message | {"sockets": table}).encode() + b"\n"
    descriptors = [one.fileno() for each in sockets.values() for one in each]
    socket.send_fds(to, [line], descriptors)


def receive(from_: socket.socket) -> tuple[dict[str, Any], Sockets]:
    """What :func:`send` has sent; waits for it. Raises OSError and ValueError where it is not that."""
    line, descriptors, _, _ = socket.recv_fds(from_, 1 << 16, MAX_DESCRIPTORS)
    passed = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    try:
        while not line.endswith(b"\n"):
            if not (more := from_.recv(1 << 16)):
                raise ConnectionError("the other process ended in mid-sentence")
            line += more
        message: dict[str, Any] = json.loads(line)
        queue, sockets = iter(passed), Sockets()
        for host, port, count in message.pop("sockets"):
            sockets[host, port] = [next(queue) for _ in range(count)]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        for one in passed:
            one.close()
        raise error if isinstance(error, OSError) else ValueError("not a message of SOLLOL's") from error
    for one in passed:
        one.setblocking(False)
    return message, sockets


def close_all(sockets: Sockets) -> None:
    """Give them up in this process."""
    for each in sockets.values():
        for one in each:
            one.close()


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address for the unix socket at ``path``, however long that is; good within the context."""
    if len(fsencode(path)) <= MAX_UNIX_PATH_BYTES or sys.platform != "linux":
        yield str(path)
        return
    folder = open_fd(path.parent, O_RDONLY | O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        close(folder)


def listen_unix(path: Path) -> socket.socket:
    """A unix socket at ``path`` for this user alone, in the place of whatever was there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{getpid()}")
    new.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with unix_address(new) as address:
            one.bind(address)
        new.chmod(0o600)  # before it listens: nobody can have come in
        one.setblocking(False)
        one.listen()
        new.replace(path)
    except OSError:
        one.close()
        raise
    return one
