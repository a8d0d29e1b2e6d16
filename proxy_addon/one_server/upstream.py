"""Asking nodes something on a client's behalf, and saying so where none can be asked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import aiohttp
import orjson
from mitmproxy import http

from agent.ollama.client import error_message
from proxy_addon.ask import BadRequest
from proxy_addon.fleet.node import Fleet, Node

JSON = "application/json; charset=utf-8"

#: For a short question (show, copy, HEAD of a blob); to delete tens of GB from a slow disk takes longest.
ANSWER_TIMEOUT_S = 60.0

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

#: A node that cannot be reached counts like one whose gateway says so.
UNREACHABLE = 502
DOWN = 503  #: and one that is sent no work, because it answers no polls or is ejected


@dataclass(frozen=True, slots=True)
class Answer:
    """A node's whole answer, its body as it came; status 502 where there was none."""

    node: Node
    status: int
    body: bytes
    content_type: str = JSON

    @property
    def ok(self) -> bool:
        """Whether the node did what it was asked."""
        return 200 <= self.status < 300

    @property
    def error(self) -> str:
        """What the body of a failure says."""
        return error_message(self.status, self.body)

    def response(self) -> http.Response:
        """The same answer for the client, with the name of the node that gave it."""
        headers = {"x-sollol-node": self.node.name}
        if self.content_type:
            headers["content-type"] = self.content_type
        return http.Response.make(self.status, self.body, headers)


@dataclass(frozen=True, slots=True)
class Caller:
    """The session that all parts share, how long connecting may take, and how long the whole answer."""

    session: aiohttp.ClientSession
    connect_s: float
    answer_s: float = ANSWER_TIMEOUT_S

    async def ask(
        self,
        node: Node,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> Answer:
        """Send one request to ``node`` and return its whole answer, whatever the status.

        ``path`` has the client's query, unchanged. Redirects are not followed.
        """
        limits = aiohttp.ClientTimeout(total=self.answer_s, sock_connect=self.connect_s)
        headers = {**headers, "content-type": "application/json"} if body else headers
        try:
            async with self.session.request(
                method,
                node.url + path,
                data=body or None,
                headers=headers,
                timeout=limits,
                allow_redirects=False,
            ) as answer:
                content_type = answer.headers.get("content-type", "")
                return Answer(node, answer.status, await answer.read(), content_type)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            text = f"{node.name} does not answer: {reason(error)}"
            return Answer(node, UNREACHABLE, orjson.dumps({"error": text}))

    async def ask_all(self, nodes: Iterable[Node], method: str, path: str, body: bytes = b"") -> list[Answer]:
        """Send the same request to all ``nodes`` at once; the answers in their order."""
        return await asyncio.gather(*(self.ask(node, method, path, body) for node in nodes))

    async def ask_until_known(
        self, nodes: Iterable[Node], method: str, path: str, body: bytes = b""
    ) -> Answer:
        """Ask one node after the other for something that any of them should know.

        A node that does not answer, fails or has not (404, its inventory was stale) is passed over. Returns
        the first other answer, else the :func:`verdict` over all. ``nodes`` must not be empty.
        """
        answers = []
        for node in nodes:
            answer = await self.ask(node, method, path, body)
            if answer.status != 404 and answer.status < 500:
                return answer
            answers.append(answer)
        return verdict(answers)


def verdict(answers: list[Answer]) -> Answer:
    """The one answer that stands for what several nodes said.

    Any success is one; 404 only if all say 404; else the first other failure, with its status and text.
    """
    ranked = sorted(answers, key=lambda answer: (not answer.ok, answer.status == 404))
    return ranked[0]


def reason(error: Exception) -> str:
    """Why a connection gave no answer, in a few words: ``connection refused``, ``no answer in time``."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    text = str(cause)
    if isinstance(
        cause, OSError
    ):  # loops put addresses into ``strerror``; what getaddrinfo says is only there
        number = cause.errno or 0
        text = os.strerror(number) if number > 0 else cause.strerror or text
    return (text or type(error).__name__).lower()


def up(fleet: Fleet, now_s: float) -> list[Node]:
    """The nodes that may be sent work, at least one.

    Raises:
        BadRequest: 503 with what is wrong with each node, if there is none.
    """
    if nodes := fleet.up(now_s):
        return nodes
    raise BadRequest(503, nobody(fleet))


def storing(nodes: list[Node]) -> list[Node]:
    """Those of ``nodes`` that can be given models: Ollamas; others only where there is nothing else."""
    return [node for node in nodes if node.kind == "ollama" and not node.coordinator] or nodes


def holders(fleet: Fleet, model: str, key: str, now_s: float) -> list[Node]:
    """The nodes that may be asked about ``key`` at the fleet's digest, the least busy first; at least one.

    Coordinators come last: they read another's store.

    Raises:
        BadRequest: 404 in Ollama's words if no node has ``model``; 503 if those that have it are down.
    """
    up(fleet, now_s)
    if found := fleet.holders(key, now_s):
        return sorted(found, key=lambda node: (node.coordinator, len(node.flights)))
    digest = fleet.digest(key)
    lost = [node for node in fleet if key in node.models and digest in (None, node.models[key].digest)]
    if not lost:
        raise BadRequest(404, f"model '{model}' not found")
    raise BadRequest(503, f"model '{model}' is only on nodes that do not answer: {_troubles(lost)}")


def nobody(nodes: Iterable[Node]) -> str:
    """The sentence for a fleet in which no node can be asked."""
    each = _troubles(nodes)
    if not each:
        return "the fleet has no nodes: name them with --nodes or in sollol.yaml"
    return f"no node of the fleet answers: {each}"


def trouble(node: Node) -> str:
    """Why ``node`` is sent no work, in a few words."""
    if node.poll_error:
        return node.poll_error
    return "not polled yet" if node.polled_s is None else node.health.reason or "ejected"


def _troubles(nodes: Iterable[Node]) -> str:
    return ", ".join(f"{node.name} ({trouble(node)})" for node in nodes)
