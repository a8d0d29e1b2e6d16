"""A node's machine and settings, and a runner on it: one loaded model with its slots."""

from __future__ import annotations

import asyncio
import os
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


@dataclass(eq=False)
class Slot:
    """One sequence of a runner, with the prompt its cache holds."""

    prompt: str = ""


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
            slot = max(self.free, key=lambda s: _common(s.prompt, prompt))
            self.free.remove(slot)
        cached, slot.prompt = _common(slot.prompt, prompt), prompt
        return slot, cached

    def give_slot(self, slot: Slot) -> None:
        """Hand a slot to the next in line."""
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                return future.set_result(slot)
        self.free.append(slot)


def _common(a: str, b: str) -> int:
    return len(os.path.commonprefix((a, b)))  # noqa: RUF071  characters are meant
