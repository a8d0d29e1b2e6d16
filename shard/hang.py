"""Is a model that spans several machines still at work, or does it hang? A pure verdict on what was seen.

An rpc-server that is stopped, or whose machine has vanished, hangs llama-server for ever, while its /health
says 200 and its /slots answers with the numbers of before (measured, build 10434). So what counts are signs
of life: tokens decoded, prompt tokens processed, bytes through the tunnels, CPU time of the processes.

- **Decoding**, a token is due every ``ms_per_token``: none for :data:`DECODE_STALL_S` is a hang, or for
  :data:`DUE_FACTOR` tokens' time, where a token takes that long by plan.
- **Prefill** may rightly be silent for minutes: one batch on slow machines. It hangs only if nothing at all
  has moved for :data:`PREFILL_STALL_S`, CPU time of the processes included: whoever computes uses it, and on
  a GPU the waiting thread spins. While one sequence is in prefill, the decoding of others waits for it.

The more certain signs, a process that has ended or is stopped and an agent that no longer answers, do not
come here: a lease tells them (``agent/lease.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DECODE_STALL_S = 7.0  #: with a look a second it is noticed within the 10 s that are promised
DUE_FACTOR = 8.0  #: of the planned time for one token; real ones vary with load and context
PREFILL_STALL_S = 60.0
#: Less CPU time a second than this is a process that waits: threads of an idle llama-server use 1 ms.
IDLE_CPU_S_PER_S = 0.02


@dataclass(frozen=True, slots=True)
class Pulse:
    """What was seen at ``at_s``; counts only ever grow while requests are served."""

    at_s: float
    prefilling: int  #: sequences whose prompt is being processed
    decoding: int  #: sequences that have begun to answer
    tokens: int  #: prompt tokens processed and tokens decoded, over all sequences
    received_bytes: int  #: through the tunnels
    cpu_s: float  #: of llama-server and its rpc-servers


def pulse(at_s: float, slots: Sequence[Mapping[str, Any]], received_bytes: int, cpu_s: float) -> Pulse:
    """Return what llama-server's ``/slots`` and the leases say at ``at_s``."""
    busy = [slot for slot in slots if slot.get("is_processing")]
    decoded = [sum(part.get("n_decoded", 0) for part in slot.get("next_token") or ()) for slot in busy]
    prompt = sum(slot.get("n_prompt_tokens_processed", 0) for slot in busy)
    decoding = sum(count > 0 for count in decoded)
    return Pulse(at_s, len(busy) - decoding, decoding, prompt + sum(decoded), received_bytes, cpu_s)


def hung(seen: Sequence[Pulse], ms_per_token: float) -> str | None:
    """Return why this is a hang, None if it is none (yet).

    ``seen`` are pulses since something moved at the request level, oldest first; ``ms_per_token`` is what the
    plan expects of one sequence.
    """
    if not seen or not (seen[-1].decoding or seen[-1].prefilling):
        return None
    now = seen[-1]
    still = _since(seen, lambda pulse: (pulse.tokens, pulse.decoding, pulse.prefilling))
    if not now.prefilling:
        limit_s = max(DECODE_STALL_S, DUE_FACTOR * ms_per_token / 1000)
        if still.at_s + limit_s <= now.at_s:
            return f"no token for {now.at_s - still.at_s:.0f} s, although one is due"
        return None
    quiet = _since(seen[seen.index(still) :], lambda pulse: pulse.received_bytes)
    silent_s = now.at_s - quiet.at_s
    if silent_s < PREFILL_STALL_S:
        return None
    if now.cpu_s - quiet.cpu_s > IDLE_CPU_S_PER_S * silent_s:
        return None
    return f"nothing has moved in a prefill for {silent_s:.0f} s"


def _since[T](seen: Sequence[Pulse], value: Any) -> Pulse:
    """The oldest pulse since which ``value`` has been what it is now."""
    oldest = seen[-1]
    for one in reversed(seen):
        if value(one) != value(oldest):
            break
        oldest = one
    return oldest
