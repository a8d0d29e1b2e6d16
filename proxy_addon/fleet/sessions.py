"""Which runner Ollama drives out next: how long each stays after its last request, as ``/api/ps`` lets tell.

Ollama takes the idle runner with the shortest keep_alive, however recently it was used, and of equal ones the
first by the path of its model's blob (``server/sched.go``, ``ByDurationAndName``). It tells only when each
would expire: that is its last use plus keep_alive. So keep_alive is what is left when that has just changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from agent.report import Resident

DEFAULT_S = 300.0  #: Ollama's keep_alive
ALIKE_S = 10.0  #: a poll sees a use so much later, a stall included; people set values further apart


@dataclass(frozen=True, slots=True)
class Session:
    """How long a runner stays after its last request, about, and what decides among equals."""

    length_s: float = DEFAULT_S
    blob: str = ""  #: hex sha256 of the model's file; "" where it is not known


NONE: Mapping[str, Session] = MappingProxyType({})
_USUAL = Session()


def followed(
    known: Mapping[str, Session],
    before: Mapping[str, Resident],
    now: Mapping[str, Resident],
    blobs: Mapping[str, str],
    at: datetime,
    first: bool,
) -> dict[str, Session]:
    """The sessions of what is in memory ``now``, where it was ``before`` at the last look.

    ``blobs`` has the blob of each manifest's digest. At the ``first`` look nobody knows when the models were
    used last: they have at least what is left, and most have the default.
    """
    found = {}
    for key, row in now.items():
        was = before.get(key)
        if key in known and was is not None and was.expires_at == row.expires_at:
            length_s = known[key].length_s
        else:
            length_s = (row.expires_at - at).total_seconds() if row.expires_at else DEFAULT_S
            length_s = max(length_s, DEFAULT_S) if first else length_s
        found[key] = Session(length_s, blobs.get(row.digest, ""))
    return found


def as_evicted(keys: Iterable[str], sessions: Mapping[str, Session]) -> list[str]:
    """``keys`` in the order in which Ollama drives them out, as long as they are idle."""
    left = sorted(keys, key=lambda key: (sessions.get(key, _USUAL).length_s, key))
    order: list[str] = []
    while left:
        limit_s = sessions.get(left[0], _USUAL).length_s + ALIKE_S
        alike = [key for key in left if sessions.get(key, _USUAL).length_s <= limit_s]
        order += sorted(alike, key=lambda key: (sessions.get(key, _USUAL).blob, key))
        left = left[len(alike) :]
    return order
