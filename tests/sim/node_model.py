"""A node as an all-knowing balancer sees it: the fakes' scheduler again, as a thing to think ahead with.

It has no tasks and no clock: :meth:`NodeModel.advance` works out what happens until a time, and a copy can be
asked what would happen if it were given one request more. It follows ``tests/fakes/scheduler.py`` and
``engine.py``; only a batch of texts to embed is taken as one piece of work, where the fake lets others in
between two texts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from tests.fakes.machine import SLOT_SIMILARITY, NodeSpec, common_length
from tests.fakes.scheduler import COMPUTE_BYTES
from tests.fakes.store import FakeModel

NEVER = math.inf


@dataclass(eq=False, slots=True)
class Work:
    """One request: what it needs, and how far it is."""

    id: str
    model: FakeModel
    num_ctx: int | None
    prompt: str
    answer: str
    prompt_tokens: int
    output_tokens: int
    prefill_left_s: float = 0.0
    tokens_left: float = 0.0
    slot: str | None = None  #: what its slot held before
    done_s: float = NEVER

    def copy(self) -> Work:
        """Return an independent copy."""
        return Work(
            self.id,
            self.model,
            self.num_ctx,
            self.prompt,
            self.answer,
            self.prompt_tokens,
            self.output_tokens,
            self.prefill_left_s,
            self.tokens_left,
            self.slot,
            self.done_s,
        )


@dataclass(eq=False, slots=True)
class RunnerModel:
    """A loaded model."""

    model: FakeModel
    num_ctx: int
    size_bytes: int
    vram_bytes: int
    session_s: float
    free: list[str]  #: what the free slots hold, the longest unused first
    active: list[Work] = field(default_factory=list)
    waiting: deque[Work] = field(default_factory=deque)
    expires_s: float = NEVER
    closed_s: float = NEVER  #: when its unloading ends

    @property
    def idle(self) -> bool:
        """Whether nobody uses it."""
        return not self.active and not self.waiting

    def copy(self) -> RunnerModel:
        """Return an independent copy."""
        return RunnerModel(
            self.model,
            self.num_ctx,
            self.size_bytes,
            self.vram_bytes,
            self.session_s,
            list(self.free),
            [work.copy() for work in self.active],
            deque(work.copy() for work in self.waiting),
            self.expires_s,
            self.closed_s,
        )


class NodeModel:
    """A node's runners, its load channel and all of its requests, as of :attr:`now_s`."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.now_s = 0.0
        self.runners: dict[str, RunnerModel] = {}
        self.channel: deque[Work] = deque()
        self.loaded_s = NEVER  #: when the load of the channel's first request ends
        self.finished: dict[str, float] = {}

    def copy(self) -> NodeModel:
        """Return an independent copy, without what has ended."""
        other = NodeModel(self.spec)
        other.now_s, other.loaded_s = self.now_s, self.loaded_s
        other.runners = {blob: runner.copy() for blob, runner in self.runners.items()}
        other.channel = deque(work.copy() for work in self.channel)
        return other

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.channel) or any(not runner.idle for runner in self.runners.values())

    # what is asked and what befalls

    def add(self, work: Work) -> None:
        """Take a request at :attr:`now_s`."""
        runner = self.runners.get(work.model.blob)
        if runner is not None and runner.closed_s == NEVER and not self._needs_reload(runner, work):
            self._use(runner, work)
        else:
            self.channel.append(work)
            self._serve_channel()

    def hold(self, model: FakeModel) -> None:
        """Have a model loaded, at the context of those who name none."""
        self._rest(self._run(model, self._num_ctx(model, None)))

    def expire_all(self) -> None:
        """Unload every model as soon as it is idle."""
        for runner in self.runners.values():
            self._expire(runner)

    def forget(self, id_: str) -> None:
        """End a request that has ended in truth."""
        for runner in self.runners.values():
            for work in runner.active:
                if work.id == id_:
                    return self._finish(runner, work)
            for work in runner.waiting:
                if work.id == id_:
                    runner.waiting.remove(work)
                    return self._rest(runner)

    # time

    def advance(self, to_s: float, until_done: str | None = None) -> None:
        """Let time pass until ``to_s``, or until the request ``until_done`` has ended."""
        while until_done not in self.finished:
            next_s = self.next_s()
            if next_s > to_s:
                break
            self._pass(next_s - self.now_s)
            self.now_s = next_s
            self._happen()
        else:
            return
        if to_s < NEVER:
            self._pass(to_s - self.now_s)
            self.now_s = to_s

    def next_s(self) -> float:
        """Return when something happens next."""
        next_s = self.loaded_s
        for runner in self.runners.values():
            next_s = min(next_s, runner.expires_s, runner.closed_s)
            if runner.active:
                token_s = self._token_s(runner)
                for work in runner.active:
                    left_s = work.prefill_left_s or work.tokens_left * token_s
                    next_s = min(next_s, self.now_s + left_s)
        return next_s

    def _pass(self, seconds: float) -> None:
        for runner in self.runners.values():
            if runner.active:
                tokens = seconds / self._token_s(runner)
                for work in runner.active:
                    if work.prefill_left_s > 0:
                        work.prefill_left_s = max(0.0, work.prefill_left_s - seconds)
                        if work.prefill_left_s < 1e-9:
                            work.prefill_left_s = 0.0
                    else:
                        work.tokens_left -= tokens

    def _happen(self) -> None:
        """Do all that is due at :attr:`now_s`."""
        for runner in list(self.runners.values()):
            for work in list(runner.active):
                if work.prefill_left_s <= 0 and work.tokens_left <= 1e-6:
                    self._finish(runner, work)
            if runner.closed_s <= self.now_s + 1e-9:
                self._close(runner)
            elif runner.expires_s <= self.now_s + 1e-9:
                self._expire(runner)
        if self.loaded_s <= self.now_s + 1e-9:
            self._loaded()
        self._serve_channel()

    # runners

    def _use(self, runner: RunnerModel, work: Work) -> None:
        runner.expires_s = NEVER
        if runner.free:
            self._begin(runner, work)
        else:
            runner.waiting.append(work)

    def _begin(self, runner: RunnerModel, work: Work) -> None:
        slot = max(runner.free, key=lambda text: common_length(text, work.prompt))
        if common_length(slot, work.prompt) <= SLOT_SIMILARITY * len(work.prompt):
            slot = runner.free[0]
        runner.free.remove(slot)
        cached = common_length(slot, work.prompt) // 4
        evaluated = max(1, work.prompt_tokens - cached)
        runner.active.append(work)
        work.slot, work.tokens_left = slot, work.output_tokens
        speed = self.spec.prefill_speed(runner.model.size)
        work.prefill_left_s = evaluated / speed * self._slowness(runner)

    def _finish(self, runner: RunnerModel, work: Work) -> None:
        runner.active.remove(work)
        work.done_s = self.finished[work.id] = self.now_s
        runner.free.append(work.prompt + work.answer)
        if runner.waiting:
            # The next one in line gets exactly this slot.
            others, runner.free = runner.free[:-1], runner.free[-1:]
            self._begin(runner, runner.waiting.popleft())
            runner.free = others
        self._rest(runner)

    def _rest(self, runner: RunnerModel) -> None:
        if runner.idle:
            if runner.session_s <= 0:
                runner.closed_s = self.now_s + self.spec.unload_s
            else:
                runner.expires_s = self.now_s + runner.session_s

    def _expire(self, runner: RunnerModel) -> None:
        runner.session_s, runner.expires_s = 0.0, NEVER
        if runner.idle and runner.closed_s == NEVER:
            runner.closed_s = self.now_s + self.spec.unload_s

    def _close(self, runner: RunnerModel) -> None:
        del self.runners[runner.model.blob]

    # the load channel

    def _serve_channel(self) -> None:
        while self.channel and self.loaded_s == NEVER:
            work = self.channel[0]
            runner = self.runners.get(work.model.blob)
            if runner is not None and runner.closed_s == NEVER and not self._needs_reload(runner, work):
                self._use(runner, self.channel.popleft())
            elif runner is None and (not self.runners or self._fits_beside(work)):
                self.loaded_s = self.now_s + work.model.size / self.spec.load_bytes_s
            else:
                self._expire(runner or self._victim())
                return

    def _loaded(self) -> None:
        work = self.channel.popleft()
        self.loaded_s = NEVER
        self._use(self._run(work.model, self._num_ctx(work.model, work.num_ctx)), work)

    def _run(self, model: FakeModel, num_ctx: int) -> RunnerModel:
        parallel = self._parallel(model)
        size = model.size + model.kv_bytes(num_ctx, parallel) + COMPUTE_BYTES
        runner = self.runners[model.blob] = RunnerModel(
            model, num_ctx, size, self._on_gpu(model, size), self.spec.keep_alive_s, [""] * parallel
        )
        return runner

    def _needs_reload(self, runner: RunnerModel, work: Work) -> bool:
        return runner.num_ctx != self._num_ctx(work.model, work.num_ctx)

    def _num_ctx(self, model: FakeModel, wanted: int | None) -> int:
        return max(4, min(wanted or self.spec.num_ctx, model.context_length))

    def _parallel(self, model: FakeModel) -> int:
        return 1 if model.capabilities == ("embedding",) else self.spec.num_parallel

    def _victim(self) -> RunnerModel:
        idle = [runner for runner in self.runners.values() if runner.idle]
        return min(idle or self.runners.values(), key=lambda runner: (runner.session_s, runner.model.blob))

    @property
    def _vram_free(self) -> int:
        return self.spec.vram_bytes - sum(runner.vram_bytes for runner in self.runners.values())

    def _fits_beside(self, work: Work) -> bool:
        if len(self.runners) >= self.spec.loaded_limit:
            return False
        model = work.model
        predicted = model.size + model.kv_bytes(self._num_ctx(model, work.num_ctx), self._parallel(model))
        if self.spec.vram_bytes and not self.spec.gpu_lost:
            return predicted <= 0.8 * self._vram_free
        ram = self.spec.ram_bytes - sum(r.size_bytes - r.vram_bytes for r in self.runners.values())
        return predicted <= 0.8 * ram

    def _on_gpu(self, model: FakeModel, size: int) -> int:
        if self.spec.gpu_lost:
            return 0
        free = self._vram_free
        if size <= free:
            return size
        per_layer = (size - COMPUTE_BYTES) / (model.block_count + 1)
        layers = max(0, int((free - COMPUTE_BYTES) / per_layer))
        return int(layers * per_layer) + COMPUTE_BYTES if layers else 0

    # speeds

    def _token_s(self, runner: RunnerModel) -> float:
        crowd = 1 + self.spec.neighbour_slowdown * max(0, len(runner.active) - 1)
        return crowd * self._slowness(runner) / self.spec.decode_speed(runner.model.size)

    def _slowness(self, runner: RunnerModel) -> float:
        spec, on_gpu = self.spec, runner.vram_bytes / runner.size_bytes
        offload = on_gpu + (1 - on_gpu) * spec.cpu_slowdown
        others = sum(1 for other in self.runners.values() if other is not runner and other.active)
        return offload * spec.slow_factor * (1 + spec.runner_slowdown * others)
