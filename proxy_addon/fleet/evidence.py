"""What the figures at the end of one answer say of the machine's speed. Pure functions, no memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from proxy_addon.fleet import hardware
from proxy_addon.fleet.hardware import Hardware

if TYPE_CHECKING:
    from proxy_addon.ask import Ask
    from proxy_addon.fleet.measured import OfNode
    from proxy_addon.fleet.node import Node
    from proxy_addon.record import FinalStats

MIN_PREFILL_TOKENS = 32  #: shorter prompts measure the overhead of a batch
MAX_PREFILL_PER_DECODE = 500.0  #: beyond it the prompt was in the prefix cache (an H100 has about 150)
MIN_DECODE_TOKENS = 4
MIN_LOAD_S = 0.1  #: a shorter "load" only looked up a loaded runner
MAX_LOAD_BYTES_S = 64e9  #: PCIe 5.0 ×16; what is faster was no load


def decode_tok_s(ask: Ask, stats: FinalStats, first_byte_s: float, total_s: float) -> float | None:
    """Tokens a second of the answer; from the stream's own timing where the protocol has no durations."""
    tokens = stats.output_tokens or 0
    if tokens < MIN_DECODE_TOKENS:
        return None
    if stats.decode_s:
        return tokens / stats.decode_s
    streamed_s = total_s - first_byte_s
    return (tokens - 1) / streamed_s if ask.stream and streamed_s > 0 else None


def prefill_tok_s(
    stats: FinalStats, cached_share: float, decoded_tok_s: float | None
) -> tuple[float, float] | None:
    """Prompt tokens a second, between two bounds; None where too little was evaluated to tell.

    Ollama counts cached prompt tokens as evaluated but takes no time for them; others leave them out. So the
    speed is that of the tokens that are not expected to be cached, or more, up to that of all it counts.
    """
    tokens = stats.prompt_tokens or 0
    evaluated = tokens * (1 - cached_share)
    if not stats.prefill_s or evaluated < MIN_PREFILL_TOKENS:
        return None
    if decoded_tok_s and evaluated / stats.prefill_s > decoded_tok_s * MAX_PREFILL_PER_DECODE:
        return None
    return evaluated / stats.prefill_s, tokens / stats.prefill_s


def load_bytes_s(stats: FinalStats, size_bytes: int) -> float | None:
    """Bytes a second at which the model was loaded; None if it was not."""
    if not stats.load_s or stats.load_s < MIN_LOAD_S:
        return None
    speed = size_bytes / stats.load_s
    return speed if speed <= MAX_LOAD_BYTES_S else None


def offload(node: Node, key: str, machine: Hardware) -> float:
    """How many times slower than wholly on its accelerator ``node`` works on the model ``key``."""
    resident = node.resident.get(key)
    if not resident or not resident.size or node.coordinator:
        return 1.0
    return hardware.offload_slowdown(min(resident.size_vram / resident.size, 1.0), machine.cpu_slowdown)


def typical_load_bytes_s(nodes: Iterable[OfNode]) -> float:
    """What a node loads in a second of which no load was measured, by those that were.

    The mean of their logarithms, with the prior as one more. Disks differ by more than ten times, a fleet's
    less than any from a guess; and loads are rare, so that the guess would stay for long.
    """
    logs = [
        math.log(hardware.LOAD_BYTES_S),
        *(node.load_bytes_s.log for node in nodes if node.load_bytes_s.n),
    ]
    return math.exp(sum(logs) / len(logs))
