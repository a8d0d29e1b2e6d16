"""The GPU of an Apple chip, which shares the machine's memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import psutil

from agent.gpu.source import Reading
from agent.report import Gpu

REREAD_S = 60.0  # an administrator may set iogpu.wired_limit_mb at any time; each look starts a process

# Chip → GB/s, from Apple's technical specifications; the smaller where a chip comes with two.
BANDWIDTH_GB_S = {
    "Apple M1": 68, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800,
    "Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800,
    "Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": 300, "Apple M3 Ultra": 819,
    "Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": 410,
    "Apple M5": 153,
}  # fmt: skip


def usable_bytes(ram_bytes: int, wired_limit_mb: int) -> int:
    """Return how much of unified memory the GPU may wire.

    That is ``iogpu.wired_limit_mb`` where it is set, else Metal's default working set: two thirds of the RAM
    up to 36 GiB, three quarters above (recommendedMaxWorkingSetSize as observed on such machines).
    """
    if wired_limit_mb > 0:
        return min(wired_limit_mb << 20, ram_bytes)
    return ram_bytes * 2 // 3 if ram_bytes <= 36 << 30 else ram_bytes * 3 // 4


def sysctl(name: str) -> str | None:
    """Return a macOS kernel value as text, None if this machine has none of that name."""
    command = ["/usr/sbin/sysctl", "-n", name]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
    return ran.stdout.strip() if ran.returncode == 0 else None


class AppleGpu:
    """One GPU: its memory is what it may wire, free is what the system has left of that."""

    def __init__(
        self,
        ask: Callable[[str], str | None] = sysctl,
        available_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._available_bytes = available_bytes
        self._clock = clock
        self._last: Gpu | None = None
        self._reread_at = float("-inf")

    def read(self) -> Reading:
        """Return the GPU; if the kernel does not answer, its last values and the reason."""
        stale = {}
        if self._clock() >= self._reread_at:
            self._reread_at = self._clock() + REREAD_S
            try:
                self._last = self._describe()
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                self._reread_at = float("-inf")
                stale["gpus"] = f"sysctl: {error}"
        if self._last is None:
            return Reading((), stale)
        total = self._last.memory_total_bytes
        free = min(total, self._available_bytes())
        update = {"memory_free_bytes": free, "memory_used_bytes": total - free}
        return Reading([self._last.model_copy(update=update)], stale)

    def _describe(self) -> Gpu:
        ram = self._ask("hw.memsize")
        if ram is None:
            raise ValueError("hw.memsize is unknown")
        name = self._ask("machdep.cpu.brand_string") or "Apple GPU"
        usable = usable_bytes(int(ram), int(self._ask("iogpu.wired_limit_mb") or 0))
        gb_s = BANDWIDTH_GB_S.get(name)
        return Gpu(
            index=0,
            name=name,
            vendor="apple",
            memory_total_bytes=usable,
            memory_free_bytes=usable,
            memory_used_bytes=0,
            memory_bandwidth_bytes_s=None if gb_s is None else gb_s * 1e9,
        )
