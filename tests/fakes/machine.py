"""A node's machine and settings, and a runner on it: one loaded model with its slots."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.fakes.exchange import Notice
from tests.fakes.store import GIB, FakeModel

#: A runner is loaded anew when one of these differs (``needsReload``).
RELOAD_OPTIONS = ("num_ctx", "num_batch", "main_gpu", "use_mmap", "num_thread", "shift")
#: Default num_ctx by the node's VRAM.
DEFAULT_NUM_CTX = ((47 * GIB, 262_144), (23 * GIB, 32_768), (0, 4096))


@dataclass
class NodeSpec:
    """The machine and its settings; speeds are those of a real machine, before ``time_scale``."""

    vram_bytes: int = 8 * GIB
    ram_bytes: int = 16 * GIB
    gpus: int = 1
    num_parallel: int = 1
    max_loaded_models: int | None = None
    max_queue: int = 512
    keep_alive_s: float = 300.0
    default_num_ctx: int | None = None
    time_scale: float = 0.05
    load_bytes_s: float = 10 * GIB
    unload_s: float = 0.1
    prefill_tok_s: float = 20_000.0
    decode_tok_s: float = 50.0
    cpu_slowdown: float = 10.0
    neighbour_slowdown: float = 0.25
    runner_slowdown: float = 0.0  # per other runner at work: processes on one GPU take turns
    memory_bandwidth_bytes_s: float = 1e12  # what the agent reports of it
    # Where they are not 0, speeds follow the model: tokens a second × bytes of the model.
    prefill_bytes_s: float = 0.0
    decode_bytes_s: float = 0.0
    token_batch: int = 1  # tokens, after the first, that come at a time: fewer wake-ups of the test's loop
    # What may befall a machine; to be changed at run time.
    slow_factor: float = 1.0
    gpu_lost: bool = False  # what is loaded from now on runs on the CPU

    def prefill_speed(self, model_bytes: int) -> float:
        """Prompt tokens a second, alone on the accelerator."""
        return self.prefill_bytes_s / model_bytes if self.prefill_bytes_s else self.prefill_tok_s

    def decode_speed(self, model_bytes: int) -> float:
        """Tokens of an answer a second, alone on the accelerator."""
        return self.decode_bytes_s / model_bytes if self.decode_bytes_s else self.decode_tok_s

    @property
    def num_ctx(self) -> int:
        """The context of a request that names none."""
        if self.default_num_ctx is not None:
            return self.default_num_ctx
        return next(ctx for vram, ctx in DEFAULT_NUM_CTX if self.vram_bytes >= vram)

    @property
    def loaded_limit(self) -> int:
        """OLLAMA_MAX_LOADED_MODELS: three a GPU, at least three."""
        return self.max_loaded_models or max(3, 3 * self.gpus)


#: Of a prompt, what a slot must hold already to be preferred to the one used longest ago (llama-server's
#: ``--slot-prompt-similarity``).
SLOT_SIMILARITY = 0.1


@dataclass(eq=False)
class Slot:
    """One sequence of a runner, with the text its cache holds: the last prompt and the answer to it."""

    text: str = ""


@dataclass(eq=False)
class Runner:
    """A loaded model."""

    model: FakeModel
    name: str
    options: dict[str, Any]
    size_bytes: int
    vram_bytes: int
    parallel: int
    session_s: float
    expires_at: datetime
    notice: Notice
    references: int = 0
    decoding: int = 0
    free: list[Slot] = field(default_factory=list)
    waiting: deque[asyncio.Future[Slot]] = field(default_factory=deque)
    evicting: bool = False
    timer: asyncio.TimerHandle | None = None
    unloaded: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_ctx(self) -> int:
        """The context of each slot."""
        return int(self.options["num_ctx"])

    def needs_reload(self, options: Mapping[str, Any]) -> bool:
        """Return whether a request with these runner options cannot use this runner."""
        if any(self.options.get(name) != options.get(name) for name in RELOAD_OPTIONS):
            return True
        layers = options.get("num_gpu")
        return layers is not None and layers >= 0 and layers != self.options.get("num_gpu")

    async def take_slot(self, prompt: str) -> tuple[Slot, int]:
        """Return a slot and how many characters of ``prompt`` its cache holds; waits in order."""
        if not self.free:
            future: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            self.notice()
            try:
                slot = await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self.give_slot(future.result())
                raise
        else:
            slot = max(self.free, key=lambda s: common_length(s.text, prompt))
            if common_length(slot.text, prompt) <= SLOT_SIMILARITY * len(prompt):
                slot = self.free[0]
            self.free.remove(slot)
        cached, slot.text = common_length(slot.text, prompt), prompt
        return slot, cached

    def give_slot(self, slot: Slot) -> None:
        """Hand a slot to the next in line; the free ones lie in the order of their last use."""
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                return future.set_result(slot)
        self.free.append(slot)


def common_length(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike, by bisection: each step compares in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
