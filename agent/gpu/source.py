"""The interface that every kind of GPU is read through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.report import Gpu


@dataclass(frozen=True)
class Reading:
    """GPUs, each at its own ``index``, and why some are old: ``gpus`` or ``gpus.<index>`` → the reason."""

    gpus: Sequence[Gpu] = ()
    stale: dict[str, str] = field(default_factory=dict)


class GpuSource(Protocol):
    """One way to learn of GPUs."""

    def read(self) -> Reading:
        """Return the GPUs as they are now; blocks, and never raises for a GPU or driver that fails."""
        ...
