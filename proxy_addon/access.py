"""Who may ask, and what: the guard's checks as pure functions, each a reason to refuse or None."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import psutil

from proxy_addon.settings import OLLAMA_PORT

HOPS_HEADER = "x-sollol-hops"  #: the proxies that a request has come through, comma-separated
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LOCAL_SUFFIXES = (".localhost", ".local", ".internal")  # Ollama server/routes.go allowedHost
LONGEST_LENGTH = 18  #: digits of a Content-Length: an exabyte
NAMED_NODES = 10  #: so that a sentence about a large fleet stays a sentence


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further. ``message`` goes to the client with HTTP ``status``."""

    status: int
    message: str


@lru_cache(maxsize=4096)
def client(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> Refusal | None:
    """403 for a client outside of ``networks``."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if any(ip in network for network in networks):
        return None
    return Refusal(403, f"clients at {ip} are not served here; guard.clients lists the networks that are")


def host(header: str, extra: Sequence[str]) -> Refusal | None:
    """403 for a Host that is not this machine's own: a foreign page whose name was rebound to loopback.

    As Ollama does for a server on loopback (``allowedHostsMiddleware``): loopback, private and own addresses,
    ``localhost``, the machine's name, local domains. Different: ``extra`` names can be configured, the answer
    says why, and link-local addresses pass (an address in Host cannot be the work of DNS).
    """
    name = host_name(header)
    if name in ("", "localhost", socket.gethostname().lower(), *extra) or name.endswith(LOCAL_SUFFIXES):
        return None
    ip = _address(name)
    if ip and (ip.is_private or ip.is_loopback or ip.is_unspecified or ip.is_link_local or name in _own()):
        return None
    return Refusal(403, f"Host {name} is not a name of this server; guard.hosts lists further ones")


def host_name(header: str) -> str:
    """The name or address in a Host header, lower-case, without port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def _own() -> set[str]:
    """This machine's addresses; asked anew each time, for they change, and only odd Hosts ask."""
    rows = (row for rows in psutil.net_if_addrs().values() for row in rows)
    return {row.address.partition("%")[0] for row in rows if row.family in (socket.AF_INET, socket.AF_INET6)}


def spellings(name: str, port: int) -> list[tuple[str, int]]:
    """``name`` and ``port`` in every form in which a node may be known: loopback has three."""
    name = name.lower().rstrip(".")
    return [(alias, port) for alias in (LOOPBACK_NAMES if name in LOOPBACK_NAMES else (name,))]


def target(
    address: tuple[str, str, int], known: bool, any_11434: bool, nodes: Iterable[str]
) -> Refusal | None:
    """403 for a proxy request to what is not Ollama.

    Args:
        address: scheme, host and port of the request.
        known: whether the fleet has a node there.
        any_11434: whether Ollama's port of every host may be asked.
        nodes: the names of the nodes, for the sentence.
    """
    scheme, name, port = address
    if scheme == "http" and (known or (any_11434 and port == OLLAMA_PORT)):
        return None
    names = sorted(nodes)
    listed = ", ".join(names[:NAMED_NODES]) + (", …" if len(names) > NAMED_NODES else "") or "none yet"
    also = f" or to port {OLLAMA_PORT} of any host" if any_11434 else ""
    where = f"{name}:{port}" if scheme == "http" else f"{scheme}://{name}:{port}"
    return Refusal(403, f"only plain HTTP to the nodes of the fleet ({listed}){also} is served, not {where}")


def loop(headers: Mapping[str, str], proxy_id: str) -> Refusal | None:
    """508 for a request that this very proxy has sent."""
    if proxy_id not in _hops(headers):
        return None
    return Refusal(
        508,
        "this request has come back to the proxy that sent it: one of its nodes is the proxy itself",
    )


def stamp(headers: MutableMapping[str, str], proxy_id: str) -> None:
    """Write into the headers of an upstream request that it has come through ``proxy_id``."""
    headers[HOPS_HEADER] = ",".join([*(hop for hop in _hops(headers) if hop != proxy_id), proxy_id])


def _hops(headers: Mapping[str, str]) -> list[str]:
    return [hop.strip() for hop in headers.get(HOPS_HEADER, "").split(",") if hop.strip()]


def framing(headers: Mapping[str, str]) -> Refusal | None:
    """501 for a body in a coding other than chunked (RFC 9112 §6.1), 400 for trailers or a broken length.

    Nothing that an Ollama client sends has trailers, and mitmproxy 12 cannot pass them on.
    """
    coding = headers.get("transfer-encoding", "chunked").strip().lower()
    if coding != "chunked":
        return Refusal(501, f"transfer-encoding {coding} is not understood here")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal() and len(length) <= LONGEST_LENGTH):
        return Refusal(400, f"content-length {length[:40]} is not a number")
    if "trailer" in headers:
        return Refusal(400, "request trailers are not understood here")
    return None


def size(announced_bytes: int, limit_bytes: int | None) -> Refusal | None:
    """413 for a body of more than ``limit_bytes``; None is no limit."""
    if limit_bytes is None or announced_bytes <= limit_bytes:
        return None
    return Refusal(413, f"the request body is larger than {limit_bytes} bytes (guard.body_limit_bytes)")
