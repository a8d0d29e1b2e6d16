"""Which models are loaded: one llama-server per model, shared by requests, unloaded when its time is up.

The rules are those of Ollama's scheduler (``server/sched.go``): a request that needs other launch options
waits until the runner is idle and reloads it; the last explicit keep_alive wins; the idle runner that
expires first makes room for another model; a load that nobody waits for any more is abandoned. Where memory
is what lacks (:class:`NoRoom`), the least valuable idle runner goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

from shard.llama_server import Launch, LlamaServer, LlamaServerError
from shard.models import ServedModel
from shard.options import DEFAULT_KEEP_ALIVE_S

log = logging.getLogger(__name__)

# OLLAMA_MAX_LOADED_MODELS' default for one device.
MAX_LOADED = 3
Start = Callable[[ServedModel, Launch], Coroutine[Any, Any, LlamaServer]]

# Ollama's "for ever" is Go's longest duration.
FOR_EVER = timedelta(days=365 * 292)


class NoRoom(LlamaServerError):
    """The model does not fit beside what is loaded; it would if all of that were gone."""


def worth(load_s: float, idle_s: float) -> float:
    """Return how valuable a loaded model is: dear to load again, and likely to be wanted soon.

    Wanted again at any moment is a model with a probability that falls with the time since it was used last
    (the hyperbolic rule of GreedyDual caches with one use); what its eviction would cost then is its load.
    """
    return load_s / (1.0 + idle_s)


async def start_here(model: ServedModel, launch: Launch) -> LlamaServer:
    """Start a model on this machine alone."""
    return await LlamaServer.start(launch)


class Runner:
    """A loaded or loading model. ``leases`` counts the requests that hold it; only Runners changes it."""

    def __init__(self, model: ServedModel, launch: Launch, load: asyncio.Task[LlamaServer]) -> None:
        self.model = model
        self.launch = launch
        self.load = load
        self.leases = 0
        self.keep_alive_s = DEFAULT_KEEP_ALIVE_S
        self.retirement: asyncio.Task[None] | None = None
        self.slots = asyncio.Semaphore(launch.parallel)
        self.expires_at = datetime.now(UTC) + FOR_EVER
        self.given_back_at_s = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def server(self) -> LlamaServer:
        """The process; only valid after the load has succeeded."""
        return self.load.result()

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory and its process alive."""
        done = self.load.done() and not self.load.cancelled() and self.load.exception() is None
        return done and not self.server.exited.done()

    @property
    def usable(self) -> bool:
        """Whether a new request may join: loading or loaded, and not on its way out."""
        return self.retirement is None and (not self.load.done() or self.loaded)


class Runners:
    """All runners of a node. ``start`` makes the process of a model and launch.

    It may raise :class:`NoRoom`; then loaded models make room, and it is asked again. With ``revive`` a model
    whose process ended by itself is loaded again at once, where it would have stayed loaded.
    """

    def __init__(
        self,
        start: Start = start_here,
        max_loaded: int = MAX_LOADED,
        *,
        revive: bool = False,
    ) -> None:
        self._start = start
        self._revive_lost = revive
        self._max_loaded = max_loaded
        self._runners: dict[str, Runner] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[Runner]:
        """Return the runners whose model is in memory, latest expiry first, as ``/api/ps`` lists them."""
        ready = [runner for runner in self._runners.values() if runner.loaded and runner.retirement is None]
        return sorted(ready, key=lambda runner: runner.expires_at, reverse=True)

    @contextlib.asynccontextmanager
    async def lease(
        self, model: ServedModel, launch: Launch, keep_alive_s: float | None
    ) -> AsyncIterator[Runner]:
        """Give a loaded runner, loading it if need be; it is not unloaded while the block lasts.

        Raises LlamaServerError if the load fails.
        """
        runner = await self._take(model, launch)
        try:
            if keep_alive_s is not None:
                runner.keep_alive_s = keep_alive_s
            # Shielded: others may wait for the same load. _give abandons it when the last one has left.
            await asyncio.shield(runner.load)
            yield runner
        finally:
            self._give(runner)

    async def unload(self, model: ServedModel) -> None:
        """Unload ``model`` as soon as it is idle; returns at once if it is busy, else when it is gone."""
        runner = self._runners.get(model.key)
        if runner is None:
            return
        runner.keep_alive_s = 0
        if not runner.leases:
            await self._retire(runner)

    async def close(self) -> None:
        """End every process."""
        await asyncio.gather(*(self._retire(runner) for runner in list(self._runners.values())))
        await asyncio.gather(*self._tasks)

    async def _take(self, model: ServedModel, launch: Launch) -> Runner:
        while True:
            runner = self._runners.get(model.key)
            if runner is not None and runner.usable and runner.launch.serves(launch):
                break
            if runner is None and len(self._runners) < self._max_loaded:
                runner = self._runners[model.key] = self._begin(model, launch)
                break
            # In the way: another launch of the same model, or, with no room, any idle one.
            victims = [runner] if runner else sorted(self._runners.values(), key=lambda one: one.expires_at)
            victim = next((one for one in victims if not one.leases and one.retirement is None), None)
            if victim is not None:
                await self._retire(victim)
                continue
            async with self._changed:
                await self._changed.wait()
        runner.leases += 1
        if runner.timer is not None:
            runner.timer.cancel()
        return runner

    def _begin(self, model: ServedModel, launch: Launch) -> Runner:
        runner = Runner(model, launch, asyncio.create_task(self._load(model, launch)))
        runner.load.add_done_callback(lambda _: self._background(self._watch(runner)))
        return runner

    async def _load(self, model: ServedModel, launch: Launch) -> LlamaServer:
        while True:
            try:
                return await self._start(model, launch)
            except NoRoom:
                if not await self._made_room(model):
                    raise

    async def _made_room(self, model: ServedModel) -> bool:
        """Unload the least valuable other model, waiting until one is idle; False if there is none."""
        others = [one for one in self._runners.values() if one.model.key != model.key and one.loaded]
        if not others:
            return False
        now_s = time.monotonic()
        idle = [one for one in others if not one.leases or one.retirement is not None]
        if idle:
            victim = min(idle, key=lambda one: worth(one.server.load_s, now_s - one.given_back_at_s))
            log.info("%s is unloaded to make room for %s", victim.model.name, model.name)
            await self._retire(victim)
        else:
            async with self._changed:
                await self._changed.wait()
        return True

    async def _watch(self, runner: Runner) -> None:
        # A runner whose load failed or whose process ends is forgotten, so that the next request respawns it.
        if not runner.load.cancelled() and runner.load.exception() is None:
            await runner.server.exited
            if runner.retirement is None:
                log.error("%s: %s", runner.model.name, runner.server.obituary())
                await runner.server.stop()
                await self._forget(runner)
                if self._revive_lost and not runner.leases and runner.expires_at > datetime.now(UTC):
                    await self._revive(runner)
                return
        await self._forget(runner)

    async def _revive(self, lost: Runner) -> None:
        """Load what was idle when it was lost; requests that held a runner load it themselves."""
        try:
            async with self.lease(lost.model, lost.launch, lost.keep_alive_s):
                log.info("%s is loaded again", lost.model.name)
        except LlamaServerError as error:
            log.error("%s cannot be loaded again: %s", lost.model.name, error)

    def _give(self, runner: Runner) -> None:
        runner.leases -= 1
        runner.given_back_at_s = time.monotonic()
        seconds = runner.keep_alive_s
        stays = FOR_EVER if math.isinf(seconds) else min(FOR_EVER, timedelta(seconds=seconds))
        runner.expires_at = datetime.now(UTC) + stays
        if not runner.leases:
            if not runner.load.done():
                self._background(self._retire(runner))
            elif not math.isinf(seconds) and self._runners.get(runner.model.key) is runner:
                loop = asyncio.get_running_loop()
                runner.timer = loop.call_later(seconds, self._expire, runner)
        self._background(self._notify())

    def _expire(self, runner: Runner) -> None:
        if not runner.leases:
            self._background(self._retire(runner))

    async def _retire(self, runner: Runner) -> None:
        if runner.retirement is None:
            runner.retirement = self._background(self._end(runner))
        # Shielded: a client that leaves meanwhile does not leave a process half stopped.
        await asyncio.shield(runner.retirement)

    async def _end(self, runner: Runner) -> None:
        # It stays listed until the process is gone, so that its memory is free before another one starts.
        if runner.timer is not None:
            runner.timer.cancel()
        runner.load.cancel()
        await asyncio.wait({runner.load})
        if not runner.load.cancelled() and runner.load.exception() is None:
            await runner.server.stop()
        await self._forget(runner)

    async def _forget(self, runner: Runner) -> None:
        if self._runners.get(runner.model.key) is runner:
            del self._runners[runner.model.key]
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
