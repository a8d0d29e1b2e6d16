"""What GPUs this machine has and how they are doing: NVIDIA, AMD, Apple, or none.

One interface, :class:`GpuSource`, one class each. A source is read from a worker thread, because reading
blocks. It never raises for a GPU that fails: that GPU keeps its last values and is named in
:attr:`Reading.stale`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from agent.gpu.amd import AmdGpus, amd_cards
from agent.gpu.apple import AppleGpu
from agent.gpu.nvidia import NvidiaGpus, nvml_present
from agent.gpu.source import GpuSource, Reading
from agent.report import Gpu

__all__ = ["AmdGpus", "AppleGpu", "GpuSource", "NoGpu", "NvidiaGpus", "Reading", "Several", "detect"]


class NoGpu:
    """A machine that computes on its CPU."""

    def read(self) -> Reading:
        """Return no GPU."""
        return Reading()


class Several:
    """The GPUs of several sources as one list, numbered through."""

    def __init__(self, sources: Sequence[GpuSource]) -> None:
        self._sources = sources

    def read(self) -> Reading:
        """Return all GPUs; indices and the keys of ``stale`` are those in the whole list."""
        gpus: list[Gpu] = []
        stale: dict[str, str] = {}
        for source in self._sources:
            reading, offset = source.read(), len(gpus)
            gpus += [gpu.model_copy(update={"index": gpu.index + offset}) for gpu in reading.gpus]
            for part, reason in reading.stale.items():
                whole, dot, index = part.partition(".")
                key = f"{whole}.{int(index) + offset}" if dot else whole
                stale[key] = f"{stale[key]}; {reason}" if key in stale else reason
        return Reading(gpus, stale)


def detect(sysfs: Path = Path("/sys")) -> GpuSource:
    """Return the source for this machine's GPUs."""
    if platform.system() == "Darwin":
        return AppleGpu() if platform.machine() == "arm64" else NoGpu()
    found: list[GpuSource] = []
    if nvml_present():
        found.append(NvidiaGpus())
    if amd_cards(sysfs):
        found.append(AmdGpus(sysfs))
    return Several(found) if len(found) > 1 else found[0] if found else NoGpu()
