"""Creating a model: its blobs and the create itself must meet on one node.

A client asks for each blob (HEAD), sends what is missing (POST) and then creates. All of it goes to one node,
chosen at the client's first blob and remembered by the client's address; which node was sent which blob is
remembered as well, so that the create finds them even from another address.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from agent.ollama import names
from proxy_addon.ask import BadRequest
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.one_server import upstream
from proxy_addon.one_server.pull import by_room
from proxy_addon.one_server.upstream import Caller

#: Longer than the upload of 100 GB at 5 MB/s takes, between one blob's beginning and the create.
REMEMBER_S = 6 * 3600.0
REMEMBER_BLOBS = 10_000
REMEMBER_CLIENTS = 1_000

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


class Memory:
    """Keys → names, each for ``lifetime_s`` seconds, at most ``capacity``: the oldest goes first."""

    def __init__(self, capacity: int, lifetime_s: float) -> None:
        self._capacity = capacity
        self._lifetime_s = lifetime_s
        self._kept: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def get(self, key: str, now_s: float) -> str | None:
        """What was put under ``key``; None if that is too long ago."""
        name, until_s = self._kept.get(key, (None, now_s))
        return name if now_s < until_s else None

    def put(self, key: str, name: str, now_s: float) -> None:
        """Remember ``name`` from now on."""
        self._kept[key] = (name, now_s + self._lifetime_s)
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def forget(self, key: str) -> None:
        """Remember nothing under ``key``."""
        self._kept.pop(key, None)


class Creates:
    """Which node each client's create goes to."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._by_client = Memory(REMEMBER_CLIENTS, REMEMBER_S)
        self._by_digest = Memory(REMEMBER_BLOBS, REMEMBER_S)

    async def for_blob(self, caller: Caller, client: str, path: str, now_s: float) -> tuple[Node, bool]:
        """The node for a blob that ``client`` asks for or sends, and whether that node has it already.

        The first blob of a client chooses: a node that has it, else the one with the most room.

        Raises:
            BadRequest: 400 for a malformed digest, 503 if no node is up or the chosen one has gone.
        """
        digest = blob_digest(path)
        able = upstream.storing(upstream.up(self._fleet, now_s))
        target = next((n for n in able if n.name == self._by_client.get(client, now_s)), None)
        held = await blobs_held(caller, [target] if target else able, [digest])
        node = target or choose(able, held)
        self._by_client.put(client, node.name, now_s)
        return node, digest in held[node.name]

    def sent(self, path: str, node: Node, now_s: float) -> None:
        """Remember that ``node`` is being sent the blob that ``path`` names."""
        self._by_digest.put(blob_digest(path), node.name, now_s)

    async def for_create(self, caller: Caller, client: str, body: Mapping[str, Any], now_s: float) -> Node:
        """The node that can create what ``body`` asks for; the client's next create may go elsewhere.

        Raises:
            BadRequest: 503 if no node is up.
        """
        able = upstream.storing(upstream.up(self._fleet, now_s))
        digests = digests_of(body)
        names_of_holders = {self._by_digest.get(digest, now_s) for digest in digests}
        node = next((n for n in able if names_of_holders == {n.name}), None)
        if node is None:
            held = await blobs_held(caller, able, digests)
            node = choose(able, held, self._holders_of(body, now_s), self._by_client.get(client, now_s))
        self._by_client.forget(client)
        return node

    def _holders_of(self, body: Mapping[str, Any], now_s: float) -> set[str]:
        source = body.get("from")
        try:
            key = names.canonical(source) if isinstance(source, str) else ""
        except ValueError:  # the node says what is wrong with it
            key = ""
        return {node.name for node in self._fleet.holders(key, now_s)}


def choose(
    nodes: list[Node],
    held: Mapping[str, set[str]],
    from_holders: set[str] = frozenset(),  # type: ignore[assignment]
    favourite: str | None = None,
) -> Node:
    """The node for a create: it holds the most of the blobs, then the ``from`` model (else it would pull it).

    Equals: the client's ``favourite``, then the node with the most room.
    """
    return max(
        by_room(nodes),  # the first of equals wins
        key=lambda node: (len(held.get(node.name, ())), node.name in from_holders, node.name == favourite),
    )


async def blobs_held(caller: Caller, nodes: list[Node], digests: Iterable[str]) -> dict[str, set[str]]:
    """Which of ``digests`` each of ``nodes`` has, by node name. A node that does not answer has none."""
    held: dict[str, set[str]] = {node.name: set() for node in nodes}
    for digest in digests:
        for answer in await caller.ask_all(nodes, "HEAD", f"/api/blobs/{digest}"):
            if answer.ok:
                held[answer.node.name].add(digest)
    return held


def digests_of(body: Mapping[str, Any]) -> set[str]:
    """The blobs that a create refers to: the values of ``files`` and ``adapters``, normalised."""
    tables = (body.get(name) for name in ("files", "adapters"))
    values = (value for table in tables if isinstance(table, dict) for value in table.values())
    return {_normal(value) for value in values if isinstance(value, str) and _DIGEST.fullmatch(value)}


def blob_digest(path: str) -> str:
    """The digest that ``/api/blobs/…`` names, as ``sha256:`` and lower case.

    Raises:
        BadRequest: 400 in Ollama's words if it is none.
    """
    digest = path.partition("?")[0].rpartition("/")[2]
    if not _DIGEST.fullmatch(digest):
        raise BadRequest(400, "invalid digest format")
    return _normal(digest)


def _normal(digest: str) -> str:
    return digest.replace("-", ":").lower()
