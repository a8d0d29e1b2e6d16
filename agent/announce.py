"""Finding each other on the local network (mDNS), so that a fleet at home needs no list of nodes.

A node announces where its agent listens; what is known of it besides stands in the TXT record. Zeroconf is
imported only when it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from agent import __version__
from agent.report import NodeKind

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

SERVICE_TYPE = "_sollol._tcp.local."
RESOLVE_TIMEOUT_MS = 3000

# Of TEST-NET-1 (RFC 5737): nobody's, so it is reached by the default route.
_ANYWHERE = ("192.0.2.1", 9)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Announced:
    """A node as it announces itself."""

    node_id: str
    kind: str
    addresses: tuple[str, ...]
    agent_port: int
    ollama_port: int | None
    version: str


@asynccontextmanager
async def announced(
    *,
    node_id: str,
    kind: NodeKind,
    addresses: Sequence[str],
    agent_port: int,
    ollama_port: int | None,
    interfaces: Sequence[str] | None = None,
) -> AsyncIterator[None]:
    """Announce this node while the context is open; ``interfaces`` are addresses, all by default.

    Raises OSError where the network lets nobody listen for multicast.
    """
    from zeroconf.asyncio import AsyncServiceInfo

    txt = {"node": node_id, "kind": kind, "version": __version__}
    if ollama_port is not None:
        txt["ollama"] = str(ollama_port)
    info = AsyncServiceInfo(
        SERVICE_TYPE,
        f"{node_id}.{SERVICE_TYPE}",
        port=agent_port,
        properties=txt,
        parsed_addresses=list(addresses),
        server=f"sollol-{node_id}.local.",
    )
    mdns = _mdns(interfaces)
    try:
        await mdns.async_register_service(info)
        yield
    finally:
        await mdns.async_unregister_all_services()
        await mdns.async_close()


@asynccontextmanager
async def browse(
    on_change: Callable[[str, Announced | None], None], *, interfaces: Sequence[str] | None = None
) -> AsyncIterator[None]:
    """Call ``on_change(node_id, node)`` for every node that appears or changes while the context is open.

    A node that takes leave, or whose announcement runs out, is told as ``on_change(node_id, None)``. Raises
    OSError where the network lets nobody listen for multicast.
    """
    from zeroconf import ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

    mdns = _mdns(interfaces)
    lookups: set[asyncio.Task[None]] = set()

    async def look_up(name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        if await info.async_request(mdns.zeroconf, RESOLVE_TIMEOUT_MS):
            node = read_announcement(info)
            if node is None:
                logger.warning("ignoring the announcement %s: it is not one of SOLLOL's", name)
            else:
                on_change(node.node_id, node)

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            on_change(name.removesuffix(f".{SERVICE_TYPE}"), None)
            return
        task = asyncio.ensure_future(look_up(name))
        lookups.add(task)
        task.add_done_callback(lookups.discard)

    browser = AsyncServiceBrowser(mdns.zeroconf, SERVICE_TYPE, handlers=[changed])
    try:
        yield
    finally:
        await browser.async_cancel()
        for task in lookups:
            task.cancel()
        await mdns.async_close()


def _mdns(interfaces: Sequence[str] | None) -> AsyncZeroconf:
    from zeroconf import InterfaceChoice
    from zeroconf.asyncio import AsyncZeroconf

    return AsyncZeroconf(interfaces=InterfaceChoice.All if interfaces is None else list(interfaces))


def read_announcement(info: AsyncServiceInfo) -> Announced | None:
    """Return what an mDNS record says, None if it is not one that a SOLLOL agent would send."""
    txt = {
        key.decode(errors="replace"): (value or b"").decode(errors="replace")
        for key, value in info.properties.items()
    }
    addresses = tuple(info.parsed_scoped_addresses())
    node_id, ollama_port = txt.get("node"), txt.get("ollama", "")
    if not node_id or not addresses or not info.port:
        return None
    return Announced(
        node_id=node_id,
        kind=txt.get("kind", "ollama"),
        addresses=addresses,
        agent_port=info.port,
        ollama_port=_port(ollama_port),
        version=txt.get("version", ""),
    )


def _port(text: str) -> int | None:
    """The port that ``text`` names, None for anything else: anybody may announce anything."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
    return number if 0 < number <= 65535 else None


def announceable(listen_hosts: Sequence[str]) -> list[str]:
    """Return the addresses under which others reach an agent that listens on ``listen_hosts``.

    Empty if it listens on loopback alone: then there is nothing to announce.
    """
    found: dict[str, None] = {}
    for host in listen_hosts:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            continue
        if address.is_unspecified:
            own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
            found |= dict.fromkeys(
                own_address for own_address in own if _reachable(own_address, address.version)
            )
        elif _reachable(host, address.version):
            found[host] = None
    return list(found)


def likely_address() -> str | None:
    """Return the address of this machine that others most likely reach: that of its default route.

    Without one, any that is not loopback; None if there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_ANYWHERE)  # sends nothing: the kernel chooses the address that it would send from
        address = str(probe.getsockname()[0])
        if _reachable(address, 4):
            return address
    return next(iter(announceable(["0.0.0.0"])), None)


def _reachable(text: str, version: int) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # a MAC address, or a link-local one with its interface
        return False
    return address.version == version and not address.is_loopback and not address.is_link_local
