"""The active look at the fleet: a task for each node (``node_watch.py``), and what can be asked of all."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable

from proxy_addon import defects
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.node_watch import NodeWatch, cancelled
from proxy_addon.fleet.polls import Http
from proxy_addon.fleet.shapes import Shapes
from proxy_addon.settings import Settings


class Watch:
    """Keeps ``fleet`` true. ``http`` gives the session; its connector must not limit the connections.

    ``proxy_id`` (letters, digits, ``_.-``) is the name under which agents count this proxy's requests.
    """

    def __init__(self, fleet: Fleet, settings: Settings, http: Http, proxy_id: str | None = None) -> None:
        self.fleet = fleet
        self.settings = settings
        self.http = http
        self.proxy_id = proxy_id or secrets.token_hex(8)
        self.shapes = Shapes(fleet, http)
        self._watched: dict[str, NodeWatch] = {}
        self._follower: asyncio.Task[None] | None = None

    @property
    def errors(self) -> int:
        """Defects that ended a round of some node, each of them in the log."""
        return sum(watch.errors for watch in self._watched.values())

    def reconfigure(self, settings: Settings) -> None:
        """Poll by ``settings`` from now on."""
        self.settings = settings
        for watch in self._watched.values():
            watch.reconfigure(settings)

    def start(self) -> None:
        """Begin to poll the fleet's nodes, and those that are added later."""
        self._follower = defects.keep_running("watch", self._follow_always)

    async def stop(self) -> None:
        """End all polls; safe to call twice."""
        if self._follower is not None:
            await cancelled([self._follower])
        await asyncio.gather(*(watch.stop() for watch in self._watched.values()))
        self._watched.clear()
        await self.shapes.stop()

    def follow(self) -> None:
        """Match the tasks with the fleet's nodes now, instead of within an interval."""
        for name in [
            name for name, watch in self._watched.items() if self.fleet.nodes.get(name) is not watch.node
        ]:
            self._watched.pop(name).forget()
        for name, node in self.fleet.nodes.items():
            if name not in self._watched:
                watch = NodeWatch(node, self.fleet, self.settings, self.http, self.proxy_id, self.shapes.want)
                self._watched[name] = watch
                watch.start()

    async def looked(self) -> None:
        """Wait until every node of the fleet is known to be lost, or to be up with its models."""
        self.follow()
        await asyncio.gather(*(watch.looked.wait() for watch in self._watched.values()))

    async def refresh(self, nodes: Iterable[Node]) -> None:
        """Ask ``nodes`` for their models at once, as after a pull; one that fails keeps what was known."""
        self.follow()
        watched = [self._watched[node.name] for node in nodes if node.name in self._watched]
        await asyncio.gather(*(watch.refresh() for watch in watched))

    async def refresh_resident(self, nodes: Iterable[Node]) -> None:
        """Ask ``nodes`` what they have in memory now, for as long as a person looks at a list."""
        watched = [self._watched[node.name] for node in nodes if node.name in self._watched]
        await asyncio.gather(*(watch.refresh_resident() for watch in watched))

    def suspect(self, node: Node) -> None:
        """A request saw ``node`` fail, or miss a model that it was said to have: poll it at once."""
        if watch := self._watched.get(node.name):
            watch.suspect()

    async def _follow_always(self) -> None:
        while True:
            self.follow()
            await asyncio.sleep(self.settings.poll.interval_s)
