"""Which of the processes behind a port this one is."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

SPEEDS = "speeds.json"


@dataclass(frozen=True, slots=True)
class Worker:
    """Number ``number`` (from 1) of ``of`` processes; one that is alone is number 1 of 1."""

    number: int = 1
    of: int = 1
    family: str = field(default_factory=lambda: secrets.token_hex(8))  #: the same for all of them

    @property
    def proxy_id(self) -> str:
        """The name under which agents count its requests; ``access.py`` knows siblings by what they share."""
        return self.family if self.of == 1 else f"{self.family}.{self.number}"

    @property
    def first(self) -> bool:
        """Whether it is the one that acts by itself for all: pins, replicas, tries of doubtful nodes."""
        return self.number == 1

    def speeds(self, state_dir: Path) -> Path:
        """Where it keeps what it has learned."""
        return state_dir / (SPEEDS if self.first else f"speeds.{self.number}.json")

    def known_speeds(self, state_dir: Path) -> Path:
        """What it begins with: its own, else what the first one knows."""
        own = self.speeds(state_dir)
        return own if own.exists() else state_dir / SPEEDS
