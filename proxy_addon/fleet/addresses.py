"""Addresses of nodes as people write them, and which of them are this proxy's own. Pure but for Own.of."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from proxy_addon.settings import OLLAMA_PORT, Address

#: "All interfaces" is where a server listens; whoever wants to reach it there asks this machine.
_LOCAL = {"": "127.0.0.1", "localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable(host: str) -> str:
    """Return the host to connect to for ``host``, which may be meant for listening (``0.0.0.0``, ````)."""
    bare = host.strip("[]").lower()
    return _LOCAL.get(bare, bare)


def from_ollama_host(text: str) -> Address | None:
    """Return the server that a value of ``OLLAMA_HOST`` names, None for an empty one.

    Reads it as Ollama does (``envconfig/config.go`` ``Host``): ``[scheme://]host[:port][/path]``; without a
    scheme the port defaults to 11434, with ``http`` to 80; a port that is none falls back to the default.

    Raises:
        ValueError: with a sentence, for what can be no node: https, or a server below a path.
    """
    value = text.strip().strip("\"'").strip()
    if not value:
        return None
    scheme, separator, rest = value.partition("://")
    if not separator:
        scheme, rest = "http", value
    if scheme.lower() != "http":
        raise ValueError(f"OLLAMA_HOST={_shown(value)} is not used: a node must speak plain HTTP")
    place, _, path = rest.partition("/")
    if path.strip("/"):
        raise ValueError(
            f"OLLAMA_HOST={_shown(value)} is not used: a node is a host and a port, without a path"
        )
    default_port = 80 if separator else OLLAMA_PORT
    host, port = _split(place)
    number = int(port) if port.isdecimal() and 0 < int(port) < 65536 else default_port
    return Address(host=reachable(host), port=number)


def _shown(value: str) -> str:
    """``value`` for a log: without the user and password that a URL may carry."""
    before, at, after = value.rpartition("@")
    return before.partition("://")[0] + "://…@" + after if at else value


def _split(place: str) -> tuple[str, str]:
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        return host, port.removeprefix(":")
    if place.count(":") > 1:  # an IPv6 address without brackets has no port
        return place, ""
    host, _, port = place.partition(":")
    return host, port


@dataclass(frozen=True, slots=True)
class Own:
    """Where this proxy listens itself: a node there would be the proxy again, without end."""

    addresses: frozenset[str]
    port: int

    @classmethod
    def of(cls, listen: Address) -> Own:
        """The addresses under which ``listen`` is reached: all of this machine's for ``0.0.0.0``."""
        if is_unspecified(listen.host):
            return cls(frozenset(local_addresses()), listen.port)
        if listen.host.lower() == "localhost":
            return cls(frozenset({"127.0.0.1", "::1"}), listen.port)
        return cls(frozenset({_plain(listen.host)}), listen.port)

    def covers(self, address: str, port: int) -> bool:
        """Whether ``address`` (an IP address, or the name as it was given to ``--listen``) is the proxy."""
        return self.port != 0 and port == self.port and _plain(address) in self.addresses

    def covers_any(self, addresses: Iterable[str], port: int) -> bool:
        """Whether one of ``addresses`` is the proxy."""
        return any(self.covers(address, port) for address in addresses)


def is_unspecified(host: str) -> bool:
    """Whether ``host`` means all interfaces."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def local_addresses() -> set[str]:
    """Return every IP address of this machine's interfaces, loopback included."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        _plain(entry.address)
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    }
    return found | {"127.0.0.1", "::1"}


def _plain(address: str) -> str:
    """An address without its zone, in one spelling; anything else in lower case."""
    bare = address.partition("%")[0].lower()
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        return bare
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return str(parsed)
