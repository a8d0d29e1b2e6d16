"""What a link between two nodes does: its round trip and its throughput.

Both are measured through the tunnel's own TLS, so they are what a sharded model will see of the link. One
measurement sends at most :data:`MOST_BYTES` and stops adding to them after :data:`LONGEST_S`: it belongs to
the moments before a plan, not to those in which tokens flow over the same link.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from agent.json_lines import JsonLines, NoMessage

ECHOES = 11
FIRST_BYTES = 65536
MOST_BYTES = 16 << 20
LONGEST_S = 0.5
ANSWER_S = 10.0

_CHUNK = bytes(1 << 18)


@dataclass(frozen=True, slots=True)
class Link:
    """A link as it was measured."""

    rtt_s: float
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes sent, and the time until their arrival was confirmed."""

    size_bytes: int
    took_s: float


def link(round_trips_s: Sequence[float], transfers: Sequence[Transfer]) -> Link:
    """Return the link that shows in these figures.

    The last and largest transfer tells the throughput, for TCP has opened its window by then; the round trip
    of its confirmation does not count.
    """
    rtt_s, last = statistics.median(round_trips_s), transfers[-1]
    return Link(rtt_s, last.size_bytes / max(last.took_s - rtt_s, last.took_s / 2, 1e-9))


def next_transfer_bytes(transfers: Sequence[Transfer]) -> int | None:
    """Return how much to send next: twice as much, or None where that would be too much or take too long."""
    if not transfers:
        return FIRST_BYTES
    sent_bytes = sum(each.size_bytes for each in transfers)
    took_s = sum(each.took_s for each in transfers)
    size_bytes = 2 * transfers[-1].size_bytes
    fits = sent_bytes + size_bytes <= MOST_BYTES and took_s + 2 * transfers[-1].took_s <= LONGEST_S
    return size_bytes if fits else None


async def measure_over(lines: JsonLines) -> Link:
    """Measure the link under a connection to a tunnel server.

    Raises NoMessage or ConnectionError where the other side does not play along, TimeoutError if it says
    nothing.
    """
    round_trips_s = [await _timed(lines, {"op": "echo"}, 0) for _ in range(ECHOES)]
    transfers: list[Transfer] = []
    while (size_bytes := next_transfer_bytes(transfers)) is not None:
        took_s = await _timed(lines, {"op": "sink", "bytes": size_bytes}, size_bytes)
        transfers.append(Transfer(size_bytes, took_s))
    return link(round_trips_s, transfers)


async def _timed(lines: JsonLines, message: dict[str, object], size_bytes: int) -> float:
    began_s = time.perf_counter()
    lines.send(message)
    while size_bytes:
        chunk = _CHUNK[:size_bytes]
        lines.transport.write(chunk)
        size_bytes -= len(chunk)
        await lines.drain()
    answer = await lines.receive(ANSWER_S)
    if answer is None:
        raise lines.error or ConnectionResetError("the connection was closed")
    if not answer.get("ok"):
        raise NoMessage(str(answer.get("error")))
    return time.perf_counter() - began_s
