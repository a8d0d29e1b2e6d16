"""Ollama's scheduler as a model: what is loaded where, who waits for what, how long everything takes.

Times are given as on a real machine and multiplied by ``time_scale``. Follows ``server/sched.go`` of v0.33:
one serial load channel with head-of-line blocking, eviction of the idle runner with the shortest session,
reloads when an option of the runner changes, unloads that hold the list of loaded models.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from tests.fakes.clock import clock_s, date_at
from tests.fakes.exchange import Notice
from tests.fakes.faults import TEXTS
from tests.fakes.machine import RELOAD_OPTIONS, NodeSpec, Runner, Slot
from tests.fakes.store import FakeModel

FOREVER_S = float(1 << 62) / 1e9
COMPUTE_BYTES = 256 << 20


class Busy(Exception):
    """The load channel is full."""


class LoadFailed(Exception):
    """A load ended with an error; the text is the node's own."""


@dataclass(eq=False)
class _Ask:
    model: FakeModel
    name: str
    options: dict[str, Any]
    keep_alive_s: float | None
    done: asyncio.Future[Runner]


def _cancel_with(work: asyncio.Task[Runner], asked: asyncio.Future[Runner]) -> None:
    """Kill a load whose request has left."""
    if asked.cancelled():
        work.cancel()


class Scheduler:
    """Loads, shares, expires and evicts runners."""

    def __init__(self, spec: NodeSpec, notice: Notice) -> None:
        self.spec = spec
        self.runners: dict[str, Runner] = {}
        self.loading: FakeModel | None = None
        self.load_errors: deque[str] = deque()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.loads_go_on = asyncio.Event()
        self.loads_go_on.set()
        self.tokens_go_on = asyncio.Event()
        self.tokens_go_on.set()
        self._notice = notice
        self._queue: deque[_Ask] = deque()
        self._wake = asyncio.Event()
        self._list_lock = asyncio.Lock()  # held while a runner is being closed: /api/ps stalls then
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop_task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin to serve the load channel."""
        self._loop_task = asyncio.get_running_loop().create_task(self._serve_queue())

    async def stop(self) -> None:
        """End every task."""
        self._stopped = True
        tasks = [*self._tasks, *([self._loop_task] if self._loop_task else [])]
        for runner in self.runners.values():
            if runner.timer:
                runner.timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def sleep(self, seconds: float) -> None:
        """Sleep ``seconds`` of the real machine's time."""
        await asyncio.sleep(seconds * self.spec.time_scale)

    @property
    def queued(self) -> int:
        """Requests in the load channel."""
        return len(self._queue)

    async def resident(self) -> list[Runner]:
        """Return the loaded runners, the latest expiry first; stalls while one is being closed."""
        async with self._list_lock:
            return sorted(self.runners.values(), key=lambda r: r.expires_at, reverse=True)

    # acquiring and releasing

    def runner_options(self, model: FakeModel, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a request's options decides about the runner: defaults < model < request."""
        merged = {**model.parameters, **options}
        wanted = {k: merged[k] for k in (*RELOAD_OPTIONS, "num_gpu") if merged.get(k) is not None}
        num_ctx = int(wanted.get("num_ctx") or self.spec.num_ctx)
        wanted["num_ctx"] = max(4, min(num_ctx, model.context_length))
        return wanted

    async def acquire(
        self, model: FakeModel, name: str, options: Mapping[str, Any], keep_alive_s: float | None
    ) -> Runner:
        """Return a runner with one reference taken.

        Raises :class:`Busy` if the load channel is full, :class:`LoadFailed` with the node's error text.
        """
        wanted = self.runner_options(model, options)
        if self._list_lock.locked():
            async with self._list_lock:
                pass
        runner = self.runners.get(model.blob)
        if runner is not None and not runner.needs_reload(wanted):
            return self._use(runner, keep_alive_s)
        if len(self._queue) >= self.spec.max_queue:
            raise Busy(TEXTS["busy"][1])
        ask = _Ask(model, name, wanted, keep_alive_s, asyncio.get_running_loop().create_future())
        self._queue.append(ask)
        self._wake.set()
        self._notice()
        try:
            return await ask.done
        except asyncio.CancelledError:
            if ask.done.done() and not ask.done.cancelled() and ask.done.exception() is None:
                self.release(ask.done.result())
            raise

    def release(self, runner: Runner) -> None:
        """Give a reference back; the last one starts the clock of keep_alive."""
        runner.references -= 1
        if runner.references > 0:
            return
        if runner.session_s <= 0:
            return self._spawn_unload(runner)
        self._arm(runner)

    def expire(self, blob: str) -> None:
        """Unload a model as soon as it is idle (``keep_alive: 0`` with nothing to generate)."""
        runner = self.runners.get(blob)
        if runner is not None:
            self._expire(runner)

    def _use(self, runner: Runner, keep_alive_s: float | None) -> Runner:
        runner.references += 1
        if keep_alive_s is not None and not runner.evicting:
            runner.session_s = keep_alive_s
        if runner.timer:
            runner.timer.cancel()
            runner.timer = None
        runner.expires_at = _expiry(runner.session_s)
        return runner

    def _arm(self, runner: Runner) -> None:
        runner.expires_at = _expiry(runner.session_s)
        if runner.session_s < FOREVER_S and not self._stopped:
            loop = asyncio.get_running_loop()
            runner.timer = loop.call_later(runner.session_s, self._spawn_unload, runner)

    def _expire(self, runner: Runner) -> None:
        if runner.timer:
            runner.timer.cancel()
            runner.timer = None
        runner.session_s = 0
        if runner.references <= 0:
            self._spawn_unload(runner)

    def _spawn_unload(self, runner: Runner) -> None:
        if self._stopped:
            return
        task = asyncio.get_running_loop().create_task(self._unload(runner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, runner: Runner) -> None:
        async with self._list_lock:
            if runner.references > 0 or self.runners.get(runner.model.blob) is not runner:
                return
            await self.sleep(self.spec.unload_s)
            del self.runners[runner.model.blob]
            self.unloads.append(runner.name)
        runner.unloaded.set()
        self._notice()

    # the load channel

    async def _serve_queue(self) -> None:
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            ask = self._queue.popleft()
            if ask.done.cancelled():
                continue
            work = asyncio.get_running_loop().create_task(self._place(ask))
            ask.done.add_done_callback(partial(_cancel_with, work))
            try:
                await asyncio.wait([work])
            finally:
                work.cancel()
            if work.cancelled():
                continue
            problem = work.exception()
            if problem is None and ask.done.cancelled():
                self.release(work.result())
            elif problem is None:
                ask.done.set_result(work.result())
            elif not ask.done.done():
                ask.done.set_exception(problem)

    async def _place(self, ask: _Ask) -> Runner:
        while True:
            runner = self.runners.get(ask.model.blob)
            if runner is not None and not runner.needs_reload(ask.options):
                return self._use(runner, ask.keep_alive_s)
            if runner is None and (not self.runners or self._fits_beside(ask)):
                return await self._load(ask)
            victim = runner or self._victim()
            victim.evicting = True
            self._expire(victim)
            self._notice()
            await victim.unloaded.wait()

    def _fits_beside(self, ask: _Ask) -> bool:
        """Return whether an additional model may load: its prediction is at most 80 % of what is free."""
        if len(self.runners) >= self.spec.loaded_limit:
            return False
        predicted = ask.model.size + ask.model.kv_bytes(ask.options["num_ctx"], self.parallel(ask.model))
        on_gpu = self.spec.vram_bytes and not self.spec.gpu_lost
        return predicted <= 0.8 * (self.vram_free if on_gpu else self.ram_free)

    def _victim(self) -> Runner:
        idle = [r for r in self.runners.values() if r.references <= 0]
        return min(idle or self.runners.values(), key=lambda r: (r.session_s, r.model.blob))

    def parallel(self, model: FakeModel) -> int:
        """Return a runner's number of slots: embedding-only models have one."""
        return 1 if model.capabilities == ("embedding",) else self.spec.num_parallel

    @property
    def vram_free(self) -> int:
        """Bytes of VRAM that no runner holds."""
        return self.spec.vram_bytes - sum(r.vram_bytes for r in self.runners.values())

    @property
    def ram_free(self) -> int:
        """Bytes of RAM that no runner holds."""
        return self.spec.ram_bytes - sum(r.size_bytes - r.vram_bytes for r in self.runners.values())

    async def _load(self, ask: _Ask) -> Runner:
        model, parallel = ask.model, self.parallel(ask.model)
        self.loading = model
        self.loads.append(ask.name)
        self._notice()
        try:
            size = model.size + model.kv_bytes(ask.options["num_ctx"], parallel) + COMPUTE_BYTES
            vram = self._on_gpu(model, size, ask.options.get("num_gpu"))
            await self.sleep(model.size / self.spec.load_bytes_s)
            await self.loads_go_on.wait()
            if self.load_errors:
                raise LoadFailed(self.load_errors.popleft())
            if size - vram > self.ram_free:
                raise LoadFailed(TEXTS["oom_startup"][1])
        finally:
            self.loading = None
            self._notice()
        session_s = self.spec.keep_alive_s if ask.keep_alive_s is None else ask.keep_alive_s
        runner = Runner(
            model, ask.name, ask.options, size, vram, parallel, session_s, _expiry(session_s), self._notice
        )
        runner.free = [Slot() for _ in range(parallel)]
        runner.references = 1
        self.runners[model.blob] = runner
        return runner

    def _on_gpu(self, model: FakeModel, size: int, num_gpu: int | None) -> int:
        """Return how many bytes go to VRAM: all, or as many whole layers as fit (or are asked for)."""
        if self.spec.gpu_lost:
            return 0
        layers = model.block_count + 1  # the output layer counts as one
        per_layer = (size - COMPUTE_BYTES) / layers
        fit = layers if size <= self.vram_free else max(0, int((self.vram_free - COMPUTE_BYTES) / per_layer))
        wanted = fit if num_gpu is None or num_gpu < 0 else min(num_gpu, fit)
        if wanted >= layers:
            return size
        return int(wanted * per_layer) + COMPUTE_BYTES if wanted else 0

    # speeds

    def prefill_s(self, runner: Runner, tokens: int) -> float:
        """Return how long ``tokens`` of a prompt take, in the real machine's seconds."""
        return tokens / self.spec.prefill_speed(runner.model.size) * self._slowness(runner)

    def token_s(self, runner: Runner) -> float:
        """Return how long one token takes at the runner's present concurrency."""
        crowd = 1 + self.spec.neighbour_slowdown * max(0, runner.decoding - 1)
        return crowd * self._slowness(runner) / self.spec.decode_speed(runner.model.size)

    def _slowness(self, runner: Runner) -> float:
        """Return how many times slower the runner is than alone, wholly on a sound accelerator."""
        spec, on_gpu = self.spec, runner.vram_bytes / runner.size_bytes
        offload = on_gpu + (1 - on_gpu) * spec.cpu_slowdown
        others = sum(1 for other in self.runners.values() if other is not runner and other.decoding)
        return offload * spec.slow_factor * (1 + spec.runner_slowdown * others)


def _expiry(session_s: float) -> datetime:
    """Return when a session ends; forever is, as in Go's maximal duration, about 292 years."""
    years = 292 * 365.25 * 86400
    return date_at(clock_s() + (min(session_s, years) if math.isfinite(session_s) else years))
