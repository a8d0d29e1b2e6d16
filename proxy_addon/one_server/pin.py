"""The one node that is signed in: push, the account, web search and cloud models use its identity.

An Ollama signs these requests with its own ed25519 key, so a fleet has one node whose key ollama.com knows.
"""

from __future__ import annotations

from proxy_addon.ask import BadRequest
from proxy_addon.fleet.node import Fleet, Node, names
from proxy_addon.one_server import upstream


def signed_in(fleet: Fleet, wanted: str | None, now_s: float) -> Node:
    """The node ``wanted`` (``settings.signed_in_node``), else the first Ollama that is up, by name.

    Raises:
        BadRequest: 503 with a sentence, if that node is not up: another one has another identity.
    """
    if wanted is None:
        return min(upstream.storing(upstream.up(fleet, now_s)), key=lambda node: node.name)
    node = fleet.nodes.get(wanted)
    if node is None:
        raise BadRequest(503, f"the signed-in node {wanted} is not in the fleet ({names(fleet)})")
    if not node.up(now_s):
        raise BadRequest(503, f"the signed-in node {wanted} does not answer: {upstream.trouble(node)}")
    return node


def pusher(fleet: Fleet, wanted: str | None, model: str, key: str, now_s: float) -> Node:
    """The signed-in node, which must hold ``model`` to push it.

    Raises:
        BadRequest: 503 as :func:`signed_in`; 404 naming who else holds the model, if it does not.
    """
    node = signed_in(fleet, wanted, now_s)
    if key not in node.models:
        elsewhere = [other for other in fleet.up(now_s) if key in other.models]
        where = f" on {node.name}, the signed-in node; it is on {names(elsewhere)}" if elsewhere else ""
        raise BadRequest(404, f"model '{model}' not found{where}")
    return node
