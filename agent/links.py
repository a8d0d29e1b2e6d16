"""What a link between two nodes does: its round trip and its throughput."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """A link as it was measured."""

    rtt_s: float
    bytes_s: float
