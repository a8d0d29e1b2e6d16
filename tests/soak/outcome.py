"""What became of one request, as the clients' process writes it down and the judge reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import orjson

#: Within this every request must have ended, however. The longest legitimate way: 45 s in line
#: (``max_wait_s``), a first byte within 20 + 10 s on a node that hangs unnoticed, a second such attempt; each
#: in ``house.SETTINGS``.
LIMIT_S = 45.0 + 2 * 30.0

End = Literal["ok", "cut", "left", "failed", "hang", "wrong", "broken", "silent"]
#: ok: whole and right; cut: right so far, then an error in the client's own protocol; left: by the client's
#: wish; failed: an HTTP error; hang: not ended in time; wrong: not what was asked for; broken: no connection,
#: or it broke before an answer; silent: an answer that broke off without a word.

Manner = Literal["stay", "leave", "slow"]


@dataclass
class Retry:
    """An attempt that the client repeated: ``refused`` by the port, or ``stale``, on a kept connection."""

    why: Literal["refused", "stale"]
    at_s: float


@dataclass
class Outcome:
    """One request of a client. Times are of the monotonic clock, which all processes share."""

    id: str
    shape: str
    model: str
    manner: Manner
    fresh: bool
    sent_s: float
    ended_s: float = 0.0
    first_byte_s: float | None = None
    end: End = "broken"
    status: int | None = None
    detail: str = ""
    tokens: int = 0
    node: str = ""
    attempts: int = 0
    request_id: str = ""
    slept_s: float = 0.0  #: by a slow reader
    retries: list[Retry] = field(default_factory=list)

    def line(self) -> bytes:
        """As a line of JSON."""
        return orjson.dumps(asdict(self)) + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Self:
        """Out of :meth:`line`."""
        fields: dict[str, Any] = orjson.loads(line)
        fields["retries"] = [Retry(**retry) for retry in fields["retries"]]
        return cls(**fields)
