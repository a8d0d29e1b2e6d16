"""The polls of one node: does it answer, what does it hold, what does its agent say.

``/api/ps`` is asked every round, for its answer says both that the node lives and what is in its memory.
Where it stays away (Ollama stalls it up to 5 s while it frees memory, ``server/sched.go``), ``/api/version``,
which waits for nothing, decides. All other sources are asked beside the rounds, never twice at a time, and
none of them can make the node look dead. Models are always asked of Ollama itself, also where there is an
agent: what counts is what this proxy reaches over its own path.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from yarl import URL

from agent.ollama import names
from agent.ollama.client import OllamaError, parse_ps, parse_tags
from agent.report import Model, Resident
from proxy_addon import access, defects
from proxy_addon.fleet import slots
from proxy_addon.fleet.agent_watch import AgentWatch
from proxy_addon.fleet.liveness import Liveness
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.polls import Http, PollFailed, fetch, parse_version
from proxy_addon.fleet.sessions import followed
from proxy_addon.fleet.shares import Share
from proxy_addon.settings import Settings

log = logging.getLogger(__name__)

PS_PATIENCE_S = 0.25  #: until /api/version is asked beside it; an idle Ollama answers within milliseconds
PS_TIMEOUT_S = 10.0  #: twice the longest stall that Ollama's scheduler makes
TAGS_TIMEOUT_S = 10.0  #: a cold disk with hundreds of manifests takes seconds
SLOW_EVERY = 5  #: rounds between two looks at /api/tags and /api/version
JITTER = 0.1  #: share of the interval by which rounds vary, so that nodes are not asked in step


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` and wait for their ends."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


class NodeWatch:
    """One node's task. ``on_models`` is called with the node whenever it has told its models."""

    def __init__(
        self,
        node: Node,
        fleet: Fleet,
        settings: Settings,
        http: Http,
        proxy_id: str,
        on_models: Callable[[Node], None],
    ) -> None:
        self.node = node
        self._wake = asyncio.Event()  #: set: the next round begins at once
        self.looked = asyncio.Event()  #: set once the node is lost, or up and its models have been asked for
        self.errors = 0
        self._fleet = fleet
        self._http = http
        self._poll = settings.poll
        self._on_models = on_models
        self._alive = Liveness(settings.poll.failures_to_lose)
        self._share = Share(node, fleet, http, proxy_id, settings.poll.timeout_s)
        self._agent = AgentWatch(node, settings, http, self._share, fleet.news)
        self._url = URL(node.url)
        self._headers: dict[str, str] = {}
        access.stamp(self._headers, proxy_id)
        self._round = 0
        self._zero: datetime | None = None  #: the date at 0 of our clock; None: its memory was not seen yet
        self._doubtful = False  #: a request saw it fail: the next round looks at everything
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._tags = asyncio.Lock()
        self._resident = asyncio.Lock()
        self._seen: dict[str, tuple[bytes, dict[str, Any]]] = {}
        #: path → hash of the last body and what it says, so that only what has changed is parsed
        self._wrong: set[str] = set()  #: what is known to be wrong and has been said

    def reconfigure(self, settings: Settings) -> None:
        """Poll by ``settings`` from the next round on."""
        self._poll = settings.poll
        self._alive.failures_to_lose = settings.poll.failures_to_lose
        self._agent.reconfigure(settings)

    def start(self) -> None:
        """Begin with the first round."""
        self._tasks["node"] = defects.keep_running("poll", self._run)

    async def stop(self) -> None:
        """End all polls of this node."""
        await cancelled(self._tasks.values())
        if (sharing := self._share.drop()) is not None:
            await cancelled([sharing])

    def forget(self) -> None:
        """End all polls without waiting: the node is no longer of the fleet."""
        self.looked.set()
        for task in self._tasks.values():
            task.cancel()
        self._share.drop()

    async def refresh(self) -> None:
        """Learn which models the node has on disk, as of a moment after this call."""
        async with self._tags:
            try:
                await self._ask("api/tags", TAGS_TIMEOUT_S, parse_tags, self._set_models)
            finally:
                self.looked.set()

    async def refresh_resident(self) -> None:
        """Learn what the node has in memory, as of a moment after this call; a stall keeps what was known."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PS_PATIENCE_S):
                await self._ps()

    def suspect(self) -> None:
        """Look at the node at once, its models included: a request found something wrong there."""
        self._doubtful = True
        self._wake.set()

    def _begin[T](
        self, name: str, look: Callable[[], Coroutine[Any, Any, T]]
    ) -> asyncio.Task[T | None] | None:
        """Start ``look`` beside the rounds; None while the one before is still on its way."""
        running = self._tasks.get(name)
        if running is not None and not running.done():
            return None
        task = asyncio.create_task(self._guarded(look), name=f"{name} of {self.node.name}")
        self._tasks[name] = task
        return task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            self._wake.clear()
            await self._guarded(self._look)
            pause_s = self._poll.interval_s * random.uniform(1 - JITTER, 1 + JITTER)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(max(begun_s + pause_s, loop.time())):
                    await self._wake.wait()

    async def _look(self) -> None:
        """One round."""
        loop = asyncio.get_running_loop()
        slow = self._doubtful or self._round % SLOW_EVERY == 0
        self._doubtful = False
        begun_s = loop.time()
        self._begin("agent", self._agent.look)
        try:
            await self._answer(ask_version=slow)
        except PollFailed as failure:
            self._failed(failure, loop.time())
            return
        now_s = loop.time()
        self.node.polled_s, self.node.poll_latency_s = now_s, now_s - begun_s
        self._round += 1
        self._answered(now_s)
        if slow:
            self._begin("tags", self.refresh)

    async def _answer(self, ask_version: bool) -> None:
        """Return once the node's Ollama has answered; raise PollFailed if it does not."""
        ps = self._begin("ps", self._ps)
        if ps is not None and not ask_version:
            await asyncio.wait({ps}, timeout=PS_PATIENCE_S)
            if ps.done():
                failure = ps.result()
                if failure is None:
                    return
                if failure.at_once:
                    raise failure
        body = await fetch(self._http, self._url / "api/version", self._poll.timeout_s, headers=self._headers)
        self.node.version = parse_version(body)

    def _answered(self, now_s: float) -> None:
        node, since_s = self.node, self._alive.since_s
        change = self._alive.answered(now_s)
        node.poll_error = None
        if change == "up":
            log.info("%s is up: Ollama %s.", node.name, node.version)
        elif change == "back":
            node.health.polled()
            log.info("%s is back after %.0f s: Ollama %s.", node.name, now_s - since_s, node.version)
        if change is not None:
            self._fleet.news(node)

    def _failed(self, failure: PollFailed, now_s: float) -> None:
        node, before = self.node, self._alive.state
        self._round = 0  # when it answers again, all of it may be new
        if self._alive.failed(now_s, failure.at_once) is None:
            return
        node.poll_error = f"it {failure.reason}"
        node.holds({})
        self._zero = None
        slots.restarted(node)
        self._seen.clear()
        self.looked.set()
        what = "is lost" if before == "up" else "cannot be used yet"
        log.warning("%s %s: %s.", node.name, what, node.poll_error)
        self._fleet.lost(node, node.poll_error)

    async def _ps(self) -> PollFailed | None:
        async with self._resident:  # one at a time: an older answer must not replace a newer one
            return await self._ask("api/ps", PS_TIMEOUT_S, parse_ps, self._set_resident)

    def _set_models(self, models: dict[str, Model]) -> None:
        if models != self.node.models:  # also where a request found one missing that is there after all
            self.node.models = dict(models)
            self._fleet.news(self.node)
        self._on_models(self.node)

    def _set_resident(self, resident: dict[str, Resident]) -> None:
        node, now_s, first = self.node, asyncio.get_running_loop().time(), self._zero is None
        if self._zero is None:
            self._zero = datetime.now(UTC) - timedelta(seconds=now_s)
        at = self._zero + timedelta(seconds=now_s)
        sessions = followed(node.sessions, node.resident, resident, self._fleet.blobs, at, first)
        if sessions != node.sessions:
            node.sessions = sessions
        if resident is not self.node.resident:  # the answer was not the same, byte for byte
            self.node.holds(resident)
            self._fleet.news(self.node)

    async def _ask[Row: (Model, Resident)](
        self,
        path: str,
        timeout_s: float,
        parse: Callable[[bytes], list[Row]],
        take: Callable[[dict[str, Row]], None],
    ) -> PollFailed | None:
        """Give ``take`` the rows at ``path`` by canonical name. A failure is said once, and returned."""
        try:
            body = await fetch(self._http, self._url / path, timeout_s, headers=self._headers)
            seen = hashlib.blake2b(body, digest_size=16).digest()
            known, rows = self._seen.get(path, (b"", {}))
            if seen != known:
                rows = self._by_key(parse(body))
                self._seen[path] = seen, rows
            take(rows)
        except PollFailed as failure:
            if self._alive.state == "up" and not failure.at_once:  # else the loss of the node itself is said
                self._say_once(path, f"it {failure.reason}")
            return failure
        except OllamaError as error:
            self._say_once(path, error.message)
            return None  # an answer, if a strange one
        self._wrong.discard(path)
        return None

    def _say_once(self, what: str, reason: str) -> None:
        if what not in self._wrong:
            self._wrong.add(what)
            log.warning("The last good /%s of %s is kept: %s.", what, self.node.name, reason)

    def _by_key[Row: (Model, Resident)](self, rows: list[Row]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for row in rows:
            try:
                found[names.canonical(row.name)] = row
            except ValueError as error:
                if row.name not in self._wrong:
                    self._wrong.add(row.name)
                    log.warning("%s lists a model that nobody can ask for: %s.", self.node.name, error)
        return found

    async def _guarded[T](self, look: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """``look``'s result. The outermost boundary of a poll: a defect in one must not blind the proxy."""
        try:
            return await look()
        except Exception as defect:  # noqa: BLE001
            self.errors += 1
            self.looked.set()
            defects.report(defect, "poll")
            return None
