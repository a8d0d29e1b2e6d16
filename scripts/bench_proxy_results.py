"""What the proxy benchmark finds, as plain data that is kept in a file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_proxy_client import SmallFound, StreamFound
from pydantic import TypeAdapter


@dataclass(frozen=True)
class Small(SmallFound):
    """One round of small requests at one concurrency: what clients found, and what it cost the proxy."""

    concurrency: int
    cpu_us: float  #: of a request


@dataclass(frozen=True)
class Streams(StreamFound):
    """One round of streams side by side."""

    cpu_ms: float  #: of a stream of 100 chunks


@dataclass(frozen=True)
class Many(StreamFound):
    """A thousand streams."""

    streams: int
    cpu_share: float
    base_mb: float
    most_mb: float


@dataclass
class Figures:
    """All that was found of one subject; ``note`` says why there is nothing, or what went wrong."""

    name: str
    title: str
    version: str = ""
    note: str = ""
    idle_share: float = math.nan
    small: list[Small] = field(default_factory=list)
    streams: list[Streams] = field(default_factory=list)
    many: Many | None = None

    def median(self, concurrency: int, value: Callable[[Small], float]) -> float:
        """Over the rounds at one concurrency."""
        return median(value(one) for one in self.small if one.concurrency == concurrency)

    def stream_ms(self) -> float:
        """Processor time of a stream of 100 chunks."""
        return median(one.cpu_ms for one in self.streams)

    def wrongs(self) -> dict[str, int]:
        """What clients saw that they should not have, and how often."""
        found: dict[str, int] = {}
        for one in (*self.small, *self.streams, *([self.many] if self.many else ())):
            for what, count in one.wrong.items():
                found[what] = found.get(what, 0) + count
        return found


@dataclass
class Results:
    """A run, or several that were put together."""

    about: dict[str, Any]
    figures: list[Figures] = field(default_factory=list)

    def of(self, name: str) -> Figures | None:
        """Those of a subject, where it was among them."""
        return next((one for one in self.figures if one.name == name), None)

    def added_ms(self, own: Figures, direct: str, concurrency: int, value: Callable[[Small], float]) -> float:
        """What a subject adds to the direct connection of the same round; the median over the rounds."""
        base = self.of(direct)
        mine, its = ([value(one) for one in who.small if one.concurrency == concurrency] if who else []
                     for who in (own, base))  # fmt: skip
        return median(with_it - without for with_it, without in zip(mine, its, strict=False))

    def save(self, path: Path) -> None:
        """Keep it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.json(), "utf-8")

    def json(self) -> str:
        """All of it as text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def load(cls, path: Path) -> Results:
        """What was kept."""
        return TypeAdapter(cls).validate_python(json.loads(path.read_text("utf-8")))


def median(values: Iterable[float]) -> float:
    """Not a number where there are none."""
    present = [value for value in values if not math.isnan(value)]
    return statistics.median(present) if present else math.nan
