"""What models are made of (``model_info`` of ``/api/show``), asked once per digest in the whole fleet."""

from __future__ import annotations

import asyncio
import logging

import orjson
from yarl import URL

from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.polls import Http, PollFailed, fetch

log = logging.getLogger(__name__)

SHOW_TIMEOUT_S = 30.0  #: Ollama reads the head of the model's file for it, perhaps from a sleeping disk
TRIES = 3  #: per digest; another node may have it as well


class Shapes:
    """Fills ``fleet.shapes`` in the background, one question at a time: nothing waits for it."""

    def __init__(self, fleet: Fleet, http: Http) -> None:
        self._fleet = fleet
        self._http = http
        self._wanted: dict[str, tuple[Node, str]] = {}  #: digest → who may be asked, and for which name
        self._tries: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def want(self, node: Node) -> None:
        """Ask for the shapes of those models of ``node`` that are not known yet."""
        for row in node.models.values():
            if row.digest not in self._fleet.shapes and self._tries.get(row.digest, 0) < TRIES:
                self._wanted.setdefault(row.digest, (node, row.name))
        if self._wanted and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._work(), name="shapes of models")

    async def stop(self) -> None:
        """Ask nothing more."""
        self._wanted.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while self._wanted:
            digest, (node, name) = self._wanted.popitem()
            if digest in self._fleet.shapes or node.poll_error is not None:
                continue
            self._tries[digest] = self._tries.get(digest, 0) + 1
            try:
                body = await fetch(
                    self._http, URL(node.url) / "api/show", SHOW_TIMEOUT_S, json={"model": name}
                )
                self._fleet.shapes[digest] = dict(orjson.loads(body)["model_info"])
            except PollFailed as failure:
                log.debug("The shape of %s is not known yet: %s %s.", name, node.name, failure.reason)
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                log.debug("The shape of %s is not known: %s shows no model_info.", name, node.name)
