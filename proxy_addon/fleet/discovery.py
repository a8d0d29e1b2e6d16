"""Where nodes come from: settings, ``OLLAMA_HOST``, this machine, names with many addresses, mDNS."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import cast

from yarl import URL

from agent import announce
from agent.report import NodeKind
from proxy_addon import defects
from proxy_addon.fleet.addresses import Own, from_ollama_host, local_addresses, reachable
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.port_conflict import port_conflict
from proxy_addon.settings import Address, NodeSettings, Settings

__all__ = ["Discovery", "Origin", "origins", "port_conflict"]

log = logging.getLogger(__name__)

RESOLVE_TIMEOUT_S = 3.0

Resolver = Callable[[str], Awaitable[list[str]]]  #: host → its IP addresses; raises OSError
OnChange = Callable[[str, announce.Announced | None], None]
Browse = Callable[[OnChange], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Origin:
    """A node (or a name with several) as somebody has named it, and who did."""

    named: NodeSettings
    source: str


def origins(settings: Settings, environ: Mapping[str, str]) -> tuple[list[Origin], list[str]]:
    """Return who is named by settings, ``OLLAMA_HOST`` and default, and sentences on what is not used.

    This machine's Ollama on :11434 is the default, taken only where nothing else is named.
    """
    found = [Origin(named, "config") for named in settings.nodes]
    notes: list[str] = []
    if settings.discovery.ollama_host:
        try:
            address = from_ollama_host(environ.get("OLLAMA_HOST", ""))
        except ValueError as error:
            notes.append(f"{error}.")
        else:
            # Clients are told by the same variable where the proxy is: that is no mistake, and no node.
            if address is not None and not _same(address, settings.listen):
                found.append(Origin(NodeSettings(host=address.host, port=address.port), "OLLAMA_HOST"))
    if not found and settings.discovery.localhost:
        local = NodeSettings(host="127.0.0.1")
        if not _same(local, settings.listen):
            found.append(Origin(local, "local"))
        else:
            notes.append(
                f"SOLLOL listens on {settings.listen} itself, so this machine's Ollama must listen elsewhere"
                " to be used: name it with --nodes."
            )
    return found, notes


def _same(address: Address, listen: Address) -> bool:
    return Own.of(listen).covers(reachable(address.host), address.port)


def nodes_of(origin: Origin, addresses: Iterable[str]) -> list[Node]:
    """Return the nodes behind ``origin``, whose host has ``addresses``: one for each if there are several.

    A name with both IPv4 and IPv6 addresses is one machine twice, so that only its IPv4 addresses count. A
    name with one address (or none known) stays a name, which is followed wherever it moves.
    """
    parsed = sorted(
        {ipaddress.ip_address(a.partition("%")[0]) for a in addresses}, key=lambda a: (a.version, a)
    )
    of_one_family = [str(a) for a in parsed if a.version == parsed[0].version]
    hosts = of_one_family if len(of_one_family) > 1 else [reachable(origin.named.host)]
    return [_node(origin, host) for host in hosts]


def _node(origin: Origin, host: str) -> Node:
    named = origin.named
    agent_url = named.agent
    if agent_url is not None and reachable(named.host) != host:
        # The agent was given under the name as well: each machine has its own.
        url = URL(agent_url)
        agent_url = str(url.with_host(host)) if url.host == named.host.lower() else None
    return Node(
        host,
        named.port,
        kind=named.kind,
        agent_url=agent_url,
        source=origin.source if reachable(named.host) == host else "dns",
        parallel=named.parallel or 1,
        parallel_known=named.parallel is not None,
        priority=named.priority,
        preferred_tasks=named.preferred_tasks,
    )


def announced_node(node: announce.Announced) -> Node | None:
    """Return the node that announces itself, None if its Ollama cannot be reached from outside."""
    usable = sorted(
        (ipaddress.ip_address(a) for a in node.addresses if "%" not in a),
        key=lambda a: (a.is_loopback, a.is_link_local, a.version),
    )
    if node.ollama_port is None or not usable or node.kind not in ("ollama", "shard"):
        return None
    host = str(usable[0])
    agent = URL.build(scheme="http", host=host, port=node.agent_port)
    return Node(host, node.ollama_port, kind=cast(NodeKind, node.kind), agent_url=str(agent), source="mdns")


async def resolve(host: str) -> list[str]:
    """Return the IP addresses of ``host``; raise OSError where it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Discovery:
    """Adds the nodes that are found to ``fleet`` and takes those that vanish, once nothing runs there."""

    def __init__(
        self,
        fleet: Fleet,
        settings: Settings,
        environ: Mapping[str, str] | None = None,
        resolver: Resolver = resolve,
        browse: Browse = announce.browse,
    ) -> None:
        self.fleet = fleet
        self.settings = settings
        self._own = Own.of(settings.listen)
        self._environ = os.environ if environ is None else environ
        self._resolve = resolver
        self._browse = browse
        self._origins: list[Origin] = []
        self._addresses: dict[str, list[str]] = {}  #: host → as it was resolved last
        self._named: dict[str, Node] = {}  #: nodes that we added because somebody named them
        self._announced: dict[str, Node] = {}  #: node id → the node that we added for it
        self._wrong: set[str] = set()
        self._stack = AsyncExitStack()
        self._browsing = False
        self._refresher: asyncio.Task[None] | None = None
        self._reconfigured = asyncio.Event()  #: set: names are resolved at once
        self.on_found: Callable[[], None] = lambda: None  #: called after each look for nodes

    async def start(self) -> None:
        """Find the nodes that are named (resolving takes 3 s at most), then go on in the background."""
        self._name_origins()
        await self.refresh()
        await self._browse_as_set()
        self._refresher = defects.keep_running("discovery", self._refresh_always)

    def reconfigure(self, settings: Settings) -> None:
        """Take leave of nodes that ``settings`` name no more, and look soon for those that are new there."""
        self.settings = settings
        self._name_origins()
        self._take_leave(self._wanted().keys())
        self._reconfigured.set()

    async def stop(self) -> None:
        """End it; the fleet stays as it is. Safe to call twice."""
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
        await self._stack.aclose()

    async def refresh(self) -> None:
        """Resolve all names now, add what is new and take leave of what is gone."""
        await asyncio.gather(*(self._look_up(host) for host in {o.named.host for o in self._origins}))
        wanted = self._wanted()
        self._take_leave(wanted.keys())
        for name, node in wanted.items():
            self._named[name] = self._known_as(node)
            self._named[name].leaving = False
        self._remove_idle()
        self.on_found()

    def _wanted(self) -> dict[str, Node]:
        """The nodes behind what is named, by the addresses that are known."""
        wanted: dict[str, Node] = {}
        for origin in self._origins:
            for node in nodes_of(origin, self._addresses.get(origin.named.host, [])):
                if not self._is_self(node, origin):
                    wanted.setdefault(node.name, node)
        return wanted

    def _take_leave(self, stay: Set[str]) -> None:
        for name in self._named.keys() - stay:
            self._named.pop(name).leaving = True
        self._remove_idle()

    def _known_as(self, node: Node) -> Node:
        """The fleet's node of that name, with what ``node`` says of it by now."""
        known = self.fleet.add(node)
        if known is node:
            return node
        if known.kind != node.kind:  # another server by now; what is in flight there ends with the old one
            self.fleet.remove(known)
            return self.fleet.add(node)
        if known.source == "mdns":
            known.source = node.source
            self._announced = {key: each for key, each in self._announced.items() if each is not known}
        known.priority, known.preferred_tasks = node.priority, node.preferred_tasks
        known.agent_url = node.agent_url or known.agent_url
        known.parallel_known = node.parallel_known
        if node.parallel_known:
            known.parallel = node.parallel
        return known

    def _name_origins(self) -> None:
        self._origins, notes = origins(self.settings, self._environ)
        for note in notes:
            log.warning(note)

    async def _browse_as_set(self) -> None:
        """Listen for announcements if, and only if, the settings want it."""
        wanted = self.settings.discovery.mdns
        if wanted == self._browsing:
            return
        self._browsing = wanted
        if not wanted:
            await self._stack.aclose()
            for node in self._announced.values():
                node.leaving = True
            self._announced.clear()
            self._remove_idle()
            return
        try:
            await self._stack.enter_async_context(self._browse(self.announced))
        except OSError as error:
            log.warning("Nodes are not looked for by mDNS: %s.", error.strerror or error)

    def announced(self, node_id: str, announcement: announce.Announced | None) -> None:
        """Take note of what mDNS tells: a node that appears or changes, or (None) one that leaves."""
        node = announced_node(announcement) if announcement is not None else None
        before = self._announced.get(node_id)
        if before is not None and (node is None or before.name != node.name):
            del self._announced[node_id]
            before.leaving = True
            self._remove_idle()
        if node is None or announcement is None or self._own.covers_any(announcement.addresses, node.port):
            return
        known = self._known(announcement, node.port)
        if known is None:
            log.info("%s has announced itself by mDNS.", node.name)
            known = self.fleet.add(node)
        if known.source == "mdns":
            self._announced[node_id] = known
            known.leaving = False
            known.agent_url = node.agent_url
        elif known.agent_url is None:
            known.agent_url = node.agent_url

    def _known(self, announcement: announce.Announced, port: int) -> Node | None:
        """The node of the fleet that is meant, whichever of its addresses it was named by."""
        addresses = set(announcement.addresses)
        if addresses & local_addresses():
            addresses.add("127.0.0.1")
        for node in self.fleet:
            if node.port == port and addresses & {node.host, *self._addresses.get(node.host, [])}:
                return node
        return None

    async def _look_up(self, host: str) -> None:
        target = reachable(host)
        try:
            ipaddress.ip_address(target)
        except ValueError:
            pass
        else:
            self._addresses[host] = [target]
            return
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                self._addresses[host] = await self._resolve(host)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
            self._say_once(f"{host} cannot be resolved ({reason}); its last addresses are kept.", host)
        else:
            self._wrong.discard(host)

    def _is_self(self, node: Node, origin: Origin) -> bool:
        addresses = [node.host]
        if node.host == reachable(origin.named.host):
            addresses += self._addresses.get(origin.named.host, [])
        if not self._own.covers_any(addresses, node.port):
            return False
        sentence = f"{node.name} is no node: SOLLOL itself listens there; name an Ollama at another address."
        self._say_once(sentence, node.name)
        return True

    def _say_once(self, sentence: str, about: str) -> None:
        if about not in self._wrong:
            self._wrong.add(about)
            log.warning(sentence)

    def _remove_idle(self) -> None:
        for node in list(self.fleet):
            if node.leaving and not node.own_flights:
                log.info("%s is no longer part of the fleet.", node.name)
                self.fleet.remove(node)

    async def _refresh_always(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.discovery.dns_refresh_s):
                    await self._reconfigured.wait()
            self._reconfigured.clear()
            await self._browse_as_set()
            await self.refresh()
