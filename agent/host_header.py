"""Whether a Host header is a server's own: a web page whose name was rebound to loopback gives another one.

As Ollama does for a server on loopback (``allowedHostsMiddleware``): loopback, private and own addresses,
``localhost``, the machine's name, local domains. Different: names can be added, and link-local addresses pass
(an address in Host cannot be the work of DNS). A server that listens for the network is called by names that
it cannot know; there nothing is checked.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil

LOCAL_SUFFIXES = (".localhost", ".local", ".internal")  # Ollama server/routes.go allowedHost


def is_own(name: str, extra: Collection[str] = ()) -> bool:
    """Whether ``name``, of :func:`name_of`, may mean this machine; ``extra`` are more names, lower-case."""
    if name in ("", "localhost", *extra) or name.endswith(LOCAL_SUFFIXES):
        return True
    near = _is_near(name)
    return name == socket.gethostname().lower() if near is None else near or name in _own()


def name_of(header: str) -> str:
    """The name or address in a Host header, lower-case, without port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def is_loopback(host: str) -> bool:
    """Whether a server that listens on ``host`` is reached from its own machine alone."""
    ip = _address(host)
    return host == "localhost" if ip is None else ip.is_loopback


@lru_cache(maxsize=256)
def _is_near(name: str) -> bool | None:
    """Whether the address ``name`` is one that DNS cannot have made of a page's own; None for other names."""
    ip = _address(name)
    return None if ip is None else ip.is_private or ip.is_loopback or ip.is_unspecified or ip.is_link_local


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def _own() -> set[str]:
    """This machine's addresses; asked anew each time, for they change, and only odd Hosts ask."""
    rows = (row for rows in psutil.net_if_addrs().values() for row in rows)
    return {row.address.partition("%")[0] for row in rows if row.family in (socket.AF_INET, socket.AF_INET6)}
