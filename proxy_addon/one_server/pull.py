"""Pulling a model onto several nodes at once: which nodes, and the pulls themselves as one stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
import orjson
from aiohttp.http_exceptions import LineTooLong

from agent.ollama.client import error_message
from proxy_addon import timeouts
from proxy_addon.fleet.node import Node
from proxy_addon.one_server.merge import Failure, Merge, Row
from proxy_addon.one_server.upstream import DOWN, UNREACHABLE, Caller, reason, storing, trouble

#: Ollama says "pulling manifest" before it asks the registry: a node that is silent for so long is stuck.
FIRST_LINE_TIMEOUT_S = 30.0

#: Rows that wait for a slow client, before the nodes are read no further.
QUEUE_ROWS = 64


def by_room(nodes: Iterable[Node], size_bytes: int = 0) -> list[Node]:
    """``nodes``, those first where a model of ``size_bytes`` (0: unknown) fits best.

    Best is: room for it on disk, then the most free GPU memory, then the most free disk. Nodes without a
    report come last, for nothing is known of them; equals are ordered by name.
    """
    return sorted(nodes, key=lambda node: _room(node, size_bytes))


def _room(node: Node, size_bytes: int) -> tuple[bool, bool, int, int, str]:
    if node.report is None:
        return (False, True, 0, 0, node.name)
    disk = node.report.host.model_store
    free_bytes = disk.free_bytes if disk else 0
    gpu_bytes = sum(gpu.memory_free_bytes for gpu in node.report.gpus)
    return (bool(disk) and free_bytes < size_bytes, False, -gpu_bytes, -free_bytes, node.name)


def targets(up: list[Node], key: str, replicas: int) -> tuple[list[Node], list[Node]]:
    """Who pulls ``key``, and who may take the place of a node that turns out not to answer, best first.

    Every node that has the model pulls, so that no replica stays behind at an old digest; others are added
    until there are ``replicas`` of them.
    """
    able = storing(up)
    having = [node for node in able if key in node.models]
    size_bytes = max((node.models[key].size for node in having), default=0)
    others = by_room((node for node in able if key not in node.models), size_bytes)
    missing = max(replicas - len(having), 0)
    return having + others[:missing], others[missing:]


class Pull:
    """The pulls of one model on ``nodes`` as one NDJSON stream: an iterator of lines.

    ``aclose`` hangs up on every node, which makes Ollama stop (what was fetched is kept for the next pull).
    ``refresh`` is awaited with the nodes that have the model now, before the client is told of success.
    """

    def __init__(
        self,
        caller: Caller,
        nodes: list[Node],
        spares: list[Node],
        body: dict[str, Any],
        refresh: Callable[[Iterable[Node]], Awaitable[None]],
    ) -> None:
        self.merge = Merge(node.name for node in nodes)
        self._caller = caller
        self._spares = deque(spares)
        self._body = orjson.dumps(body | {"stream": True})
        self._refresh = refresh
        self._events: asyncio.Queue[tuple[Node, Row | Failure]] = asyncio.Queue(QUEUE_ROWS)
        self._ready: deque[Row] = deque()
        self._done: list[Node] = []
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()
        for node in nodes:
            self._start(node)

    def __aiter__(self) -> Pull:
        return self

    async def __anext__(self) -> bytes:
        await self.begun()
        if not self._ready:
            raise StopAsyncIteration
        return orjson.dumps(self._ready.popleft()) + b"\n"

    async def begun(self) -> bool:
        """Wait for the next row. Returns whether there is one that is not a failure of every node."""
        while not self._ready and not self._ended:
            await self._step()
        return bool(self._ready) and "error" not in self._ready[0]

    async def ended(self) -> tuple[int, Row]:
        """Wait for the end. Returns HTTP status and last row, for a client that wants no progress."""
        while not self._ended:
            self._ready.clear()
            await self._step()
        return self.merge.result()

    async def aclose(self) -> None:
        """Hang up on every node; harmless the second time."""
        self._ended = True
        self._ready.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _step(self) -> None:
        if not self.merge.running:
            await self._refresh(self._done)
            self._ended = True
            self._ready.append(self.merge.result()[1])
            return
        node, what = await self._events.get()
        if isinstance(what, Failure):
            self._ready.extend(self._failed(node, what))
            return
        self._ready.extend(self.merge.feed(node.name, what))
        if node.name in self.merge.finished:
            self._done.append(node)

    def _failed(self, node: Node, failure: Failure) -> list[Row]:
        spare = self._spares.popleft() if failure.unreachable and self._spares else None
        if spare:
            self._start(spare)
        return self.merge.fail(node.name, failure, spare.name if spare else None)

    def _start(self, node: Node) -> None:
        self._tasks.add(asyncio.create_task(self._pull(node)))

    async def _pull(self, node: Node) -> None:
        try:
            failure = await self._read(node)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            failure = Failure(UNREACHABLE, reason(error), unreachable=True)
        except LineTooLong:
            failure = Failure(UNREACHABLE, "sent a line that is too long")
        if failure:
            await self._events.put((node, failure))

    async def _read(self, node: Node) -> Failure | None:
        """Queue the rows of ``node`` up to ``success`` or ``error``. Returns what is wrong if none comes."""
        if not node.up(asyncio.get_running_loop().time()):
            return Failure(DOWN, trouble(node), unreachable=True)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._caller.connect_s)
        async with asyncio.timeout(FIRST_LINE_TIMEOUT_S):
            answer = await self._caller.session.post(
                f"{node.url}/api/pull",
                data=self._body,
                headers={"content-type": "application/json"},
                timeout=limits,
                allow_redirects=False,
            )
        async with answer:
            if answer.status != 200:
                return Failure(answer.status, error_message(answer.status, await answer.read()))
            while line := await _next_line(node, answer.content):
                row = _object(line)
                if row is None:
                    return Failure(UNREACHABLE, f"sent a line that is no JSON object: {line[:80]!r}")
                await self._events.put((node, row))
                if "error" in row or row.get("status") == "success":
                    return None
        if line is None:
            return Failure(UNREACHABLE, f"{trouble(node)}, and nothing came since", unreachable=True)
        return Failure(UNREACHABLE, "the answer ended without success", unreachable=True)


async def _next_line(node: Node, content: aiohttp.StreamReader) -> bytes | None:
    """The next line, empty at the end; None if nothing comes from ``node``, which is lost.

    A node that answers polls may be silent for as long as it likes: it checks digests without a word.
    """
    line = asyncio.ensure_future(content.readline())
    try:
        while not (await asyncio.wait({line}, timeout=timeouts.LOST_IDLE_S))[0]:
            if node.poll_error is not None:
                return None
        return line.result()
    finally:
        if not line.cancel():
            line.exception()  # has been retrieved then, should we have been cancelled in the same moment


def _object(line: bytes) -> Row | None:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
