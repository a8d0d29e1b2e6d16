"""Who may ask, and what: the guard's checks as pure functions, each a reason to refuse or None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from agent import host_header
from proxy_addon.settings import OLLAMA_PORT

HOPS_HEADER = "x-sollol-hops"  #: the proxies that a request has come through, comma-separated
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LONGEST_LENGTH = 18  #: digits of a Content-Length: an exabyte
#: What is inside a tunnel could not be seen.
NO_TUNNELS = "CONNECT is not served: the fleet speaks plain HTTP"
NAMED_NODES = 10  #: so that a sentence about a large fleet stays a sentence


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further. ``message`` goes to the client with HTTP ``status``."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)  #: that the answer has besides


def behind(peer: str, headers: Mapping[str, str], trusted: Sequence[IPv4Network | IPv6Network]) -> str:
    """The address of the client: ``peer``, or whom it names, where that is a proxy to be ``trusted``.

    Of ``X-Forwarded-For`` the last address counts that is not itself one to be trusted: what is before it
    anybody may have written. What is no address ends the walk; nobody beyond it is known.
    """
    named = headers.get("x-forwarded-for") or headers.get("x-real-ip", "")
    hops = [hop.strip() for hop in named.split(",") if hop.strip()]
    found = peer
    while hops and _within(found, trusted):
        hop = _address(hops.pop())
        if hop is None:
            break
        found = hop
    return found


def _address(text: str) -> str | None:
    """The address in ``text``, which may have a port beside it; None where it is none."""
    host = text.partition("]")[0].removeprefix("[") if text.startswith("[") else text
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        return str(ip_address(host))
    except ValueError:
        return None


def _within(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return any(ip in network for network in networks)


def client(address: str, networks: Sequence[IPv4Network | IPv6Network]) -> Refusal | None:
    """403 for a client outside of ``networks``."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if any(ip in network for network in networks):
        return None
    return Refusal(403, f"clients at {ip} are not served here; guard.clients lists the networks that are")


def host(header: str, extra: Sequence[str]) -> Refusal | None:
    """403 for a Host that is not this machine's own; ``extra`` names can be configured."""
    name = host_header.name_of(header)
    if host_header.is_own(name, extra):
        return None
    return Refusal(403, f"Host {name} is not a name of this server; guard.hosts lists further ones")


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
    if HOPS_HEADER not in headers or family(proxy_id) not in _hops(headers):
        return None
    return Refusal(
        508,
        "this request has come back to the proxy that sent it: one of its nodes is the proxy itself",
    )


def stamp(headers: MutableMapping[str, str], proxy_id: str) -> None:
    """Write into the headers of an upstream request that it has come through ``proxy_id``."""
    own = family(proxy_id)
    before = [hop for hop in _hops(headers) if hop != own] if HOPS_HEADER in headers else ()
    headers[HOPS_HEADER] = ",".join((*before, own)) if before else own


def family(proxy_id: str) -> str:
    """What the ids of all workers of one proxy have in common (``workers/worker.py``)."""
    return proxy_id.partition(".")[0]


def _hops(headers: Mapping[str, str]) -> list[str]:
    found = headers.get(HOPS_HEADER)
    return [hop.strip() for hop in found.split(",") if hop.strip()] if found else []


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


def too_large(limit_bytes: int, setting: str) -> Refusal:
    """413 for a body of more than the ``limit_bytes`` that ``setting`` allows."""
    return Refusal(413, f"the request body is larger than {limit_bytes} bytes ({setting})")
