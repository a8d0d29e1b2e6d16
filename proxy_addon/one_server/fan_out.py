"""Changes that concern every holder of a model: delete, copy, unload.

Each asks all nodes at once and answers with :func:`proxy_addon.one_server.upstream.verdict`. None of them is
repeated: a request that broke off may have taken effect.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from proxy_addon.fleet.node import Fleet, Node, names
from proxy_addon.one_server import catalog, upstream
from proxy_addon.one_server.upstream import Answer, Caller

logger = logging.getLogger(__name__)

_EMPTY: dict[str, dict[str, Any]] = {
    "/api/generate": {"response": ""},
    "/api/chat": {"message": {"role": "assistant", "content": ""}},
}


async def delete(caller: Caller, nodes: list[Node], path: str, body: bytes) -> Answer:
    """Delete a model on all ``nodes``: 200 if any had it, 404 if none had."""
    return _one_of(await caller.ask_all(nodes, "DELETE", path, body), "delete")


async def copy(caller: Caller, holders: list[Node], path: str, body: bytes) -> Answer:
    """Copy a model on each of its ``holders`` that can store one: 200 if any did it."""
    return _one_of(await caller.ask_all(upstream.storing(holders), "POST", path, body), "copy")


async def unload(caller: Caller, nodes: list[Node], path: str, body: bytes) -> Answer:
    """Unload a model on all ``nodes``; Ollama answers 200 also where it was not loaded."""
    return _one_of(await caller.ask_all(nodes, "POST", path, body), "unload")


def to_delete(fleet: Fleet, key: str, now_s: float) -> list[Node]:
    """Who must delete ``key``: every Ollama, whatever the inventory says, and what else stores it.

    A coordinator lists what is in its machine's store, which is an Ollama's to change. A node that is down
    keeps it, and brings it back into the fleet with it: that is logged.

    Raises:
        BadRequest: 503 if no node is up.
    """
    up = upstream.up(fleet, now_s)
    if missed := [node for node in fleet if key in node.models and node not in up]:
        logger.warning("delete of %s does not reach %s, which will still have it", key, names(missed))
    able = upstream.storing(up)
    return [node for node in up if node in able or (key in node.models and not node.coordinator)]


def to_unload(fleet: Fleet, model: str, key: str, now_s: float) -> list[Node]:
    """Who must unload ``key``: all that hold it, at any digest; a model still loading is in no list.

    Raises:
        BadRequest: as :func:`proxy_addon.one_server.upstream.holders`, if there is nobody.
    """
    found = [node for node in fleet.up(now_s) if key in node.models or key in node.resident]
    return found or upstream.holders(fleet, model, key, now_s)


def unloaded(path: str, model: str, when: datetime) -> dict[str, Any]:
    """What Ollama says to an unload on ``path``; ``model`` is echoed as the client wrote it."""
    stamp = {"model": model, "created_at": catalog.go_time(when)}
    return stamp | _EMPTY[path] | {"done": True, "done_reason": "unload"}


def _one_of(answers: list[Answer], what: str) -> Answer:
    chosen = upstream.verdict(answers)
    if chosen.ok:
        for answer in answers:
            if not answer.ok and answer.status != 404:
                logger.warning("%s failed on %s alone: %s", what, answer.node.name, answer.error)
    return chosen
