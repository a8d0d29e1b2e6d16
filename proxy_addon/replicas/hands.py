"""Carries out one action on one node, with the requests that Ollama has for it: an empty prompt each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import aiohttp
import orjson

from proxy_addon.failover import UNFIT_S
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.one_server.upstream import Answer, Caller
from proxy_addon.replicas import snapshot
from proxy_addon.replicas.actions import Action, Load, Unload
from proxy_addon.retry import Meaning, classify
from proxy_addon.settings import Settings

FOREVER = -1  #: as keep_alive
ABANDONED = 2  #: Ollama itself gives a replica up after so many ``idle_s``, should SOLLOL be gone
EMBEDS_ONLY = "does not support generate"  #: Ollama's words (``server/routes.go``)


class Hands:
    """Does what was decided. ``stamp`` marks a request as ours, ``refresh`` asks what is in memory now."""

    def __init__(
        self,
        fleet: Fleet,
        speeds: Speeds,
        settings: Settings,
        session: Callable[[], aiohttp.ClientSession],
        now: Callable[[], float],
        stamp: Callable[[MutableMapping[str, str]], None],
        refresh: Callable[[Iterable[Node]], Awaitable[None]],
    ) -> None:
        self.fleet, self.speeds, self.settings = fleet, speeds, settings
        self._session, self._now, self._stamp, self._refresh = session, now, stamp, refresh
        self._embeds: set[str] = set()  #: models that only embed, which another endpoint loads

    def reconfigure(self, settings: Settings) -> None:
        """Other limits and times from now on."""
        self.settings = settings

    async def do(self, action: Action) -> Answer:
        """Carry ``action`` out; what the node said to it."""
        node = self.fleet.nodes[action.node]
        if isinstance(action, Load):
            return await self._load(action, node)
        if isinstance(action, Unload):
            return await self._send(node, action.model, {"keep_alive": 0})
        options = snapshot.options_there(node, action.model)
        return await self._send(node, action.model, {"keep_alive": FOREVER, "options": options})

    async def _load(self, action: Load, node: Node) -> Answer:
        """Load, counted in flight so that placement sees the load under way."""
        key, row = action.model, node.models.get(action.model)
        fleet = self.fleet
        ask = snapshot.load_ask(
            key, fleet.usual(key) if action.pinned else snapshot.options_in_use(fleet, key)
        )
        machine = self.speeds.machine(node.name, node.report)
        expected_s = self.speeds.estimate(node.name, machine, key, row.size).load_s if row else 0.0
        flight = node.take(ask, self._now(), expected_s, load=True, service_s=0.0)
        node.loaded_with[key] = ask.reload_key
        stays = FOREVER if action.pinned else f"{ABANDONED * self.settings.replication.idle_s:.0f}s"
        try:
            answer = await self._send(node, key, {"keep_alive": stays, "options": dict(ask.reload_key)})
        finally:
            flight.drop()
        await self._refresh([node])  # news, at which who waits for a slot looks at the node again
        if classify("status", answer.status, answer.error, ask.endpoint) is Meaning.TOO_SMALL:
            node.unfit_until_s[key] = self._now() + UNFIT_S
        return answer

    async def _send(self, node: Node, key: str, wanted: dict[str, Any]) -> Answer:
        timeouts = self.settings.timeouts
        caller = Caller(self._session(), timeouts.connect_s, timeouts.first_byte_s + timeouts.load_s)
        headers: dict[str, str] = {}
        self._stamp(headers)
        body = {"model": node.models[key].name if key in node.models else key, **wanted}
        if key not in self._embeds:
            generate = orjson.dumps(body | {"stream": False})
            answer = await caller.ask(node, "POST", snapshot.GENERATE, generate, headers)
            if answer.status != 400 or EMBEDS_ONLY not in answer.error:
                return answer
            self._embeds.add(key)
        return await caller.ask(node, "POST", "/api/embed", orjson.dumps(body | {"input": []}), headers)
