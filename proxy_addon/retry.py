"""What a failed attempt means and whether another node may be tried: a table, a budget, a back-off.

Texts: Ollama's source, v0.24 and v0.33 (``server/routes.go``, ``server/sched.go``, ``llm/server.go``,
``llm/llama_server.go``). Statuses alone do not decide: the same 500 may be a dying runner or a bad request,
and embedding endpoints report a dead runner as 400.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from proxy_addon.endpoints import Endpoint, Handling
from proxy_addon.settings import Settings


class Meaning(StrEnum):
    """What a failure says about the node."""

    UNREACHABLE = "unreachable"  #: refused, timed out, reset: ejected at once
    DIED = "died"  #: the connection broke or carried garbage after the request was sent
    FULL = "full"  #: 503: it has more than enough to do; it is not idle because it answered fast
    STALE = "stale"  #: it does not have the model that it was said to have
    TOO_SMALL = "too_small"  #: the model does not fit there now
    BROKEN = "broken"  #: its runner failed; the next one may work
    REFUSED = "refused"  #: the node will not talk to us at all (host check)
    MOVED = "moved"  #: nothing: we took the request back, for another node is faster by now
    ANSWER = "answer"  #: not a failure of the node: the client must see it


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: an HTTP status (None: any) and a text that mean something."""

    status: int | None
    text: re.Pattern[str]
    meaning: Meaning
    paths: tuple[str, ...] = ()  #: only for these endpoints; empty: for all


def _row(status: int | None, text: str, meaning: Meaning, *paths: str) -> Row:
    return Row(status, re.compile(text, re.IGNORECASE), meaning, paths)


_EMBED = ("/api/embed", "/api/embeddings", "/v1/embeddings")

#: First match decides; what matches nothing is the client's to see.
TABLE: tuple[Row, ...] = (
    _row(503, r"server busy|maximum pending requests", Meaning.FULL),
    _row(503, r"", Meaning.FULL),
    _row(429, r"", Meaning.FULL),
    _row(404, r"model .* not found|not found, try pulling", Meaning.STALE),
    _row(508, r"come back to the proxy", Meaning.STALE),  # another SOLLOL, which has the model only from us
    _row(500, r"out[- ]of[- ]memory|cudaMalloc failed|failed to allocate", Meaning.TOO_SMALL),
    _row(500, r"requires more system memory|unable to load full model on GPU", Meaning.TOO_SMALL),
    _row(500, r"model requires .* but only .* (is|are) available", Meaning.TOO_SMALL),
    _row(500, r"llama[- ](server|runner) process|llama (runner|server) to start", Meaning.BROKEN),
    _row(500, r"llama-server (to start|exited|failed)|error starting llama-server", Meaning.BROKEN),
    _row(500, r"timed out waiting for llama", Meaning.BROKEN),
    _row(500, r"model runner has unexpectedly stopped|unexpected server status", Meaning.BROKEN),
    _row(500, r"no slots available|model failed to load|no longer running", Meaning.BROKEN),
    _row(500, r"connection refused|connection reset|unexpected EOF|: EOF", Meaning.BROKEN),
    # What keeps one coordinator (shard/coordinator.py) from a plan need not keep the next.
    _row(500, r"link to .* cannot be measured|no llama-server that can use other machines", Meaning.BROKEN),
    _row(400, r"do embedding request|no longer running", Meaning.BROKEN, *_EMBED),
    _row(403, r"^$", Meaning.REFUSED),  # Ollama's host check: empty body
    _row(502, r"^$|bad gateway", Meaning.BROKEN),
    _row(504, r"", Meaning.BROKEN),
)

#: Endpoints whose work must not be done twice: only a failed connect may be tried elsewhere.
NEVER_TWICE = frozenset({"/api/create", "/api/push", "/api/delete", "/api/copy", "/api/blobs/*"})


def classify(phase: str, status: int | None, text: str, endpoint: Endpoint) -> Meaning:
    """What a failure of ``phase`` (see ``attempt.Failure``) with ``status`` and ``text`` means."""
    if phase == "connect":
        return Meaning.UNREACHABLE
    if phase in ("reset", "empty"):
        return Meaning.DIED
    for row in TABLE:
        here = row.status in (None, status) and (not row.paths or endpoint.path in row.paths)
        if here and row.text.search(text):
            return row.meaning
    return Meaning.ANSWER


def may_retry(meaning: Meaning, phase: str, endpoint: Endpoint, replayable: bool) -> bool:
    """Whether the request may be sent to another node after such a failure."""
    if meaning is Meaning.ANSWER or not replayable:
        return False
    if endpoint.path in NEVER_TWICE or endpoint.handling is not Handling.ROUTE:
        return phase == "connect" and endpoint.handling is Handling.ANY
    return True


@dataclass(slots=True)
class Budget:
    """Bounds retries to a share of the requests, so that a sick fleet is not hammered.

    At most ``ratio`` × requests of the last :attr:`window_s` seconds, plus ``min_per_s`` a second so that a
    quiet fleet can fail over at all (Finagle's and Envoy's retry budgets have the same two parts).
    """

    ratio: float
    min_per_s: float
    window_s: float = 10.0
    _requests: deque[float] = field(default_factory=deque)
    _retries: deque[float] = field(default_factory=deque)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The budget that ``settings`` allow, untouched."""
        retry = settings.retry
        return cls(retry.budget_ratio, retry.budget_min_per_s, retry.budget_window_s)

    def reconfigure(self, settings: Settings) -> None:
        """Other bounds; what was counted stays."""
        retry = settings.retry
        self.ratio, self.min_per_s = retry.budget_ratio, retry.budget_min_per_s
        self.window_s = retry.budget_window_s

    def request(self, now_s: float) -> None:
        """Count a request."""
        self._requests.append(now_s)

    def take(self, now_s: float) -> bool:
        """Take one retry out of the budget; False if it is spent."""
        oldest_s = now_s - self.window_s
        for times in (self._requests, self._retries):
            while times and times[0] < oldest_s:
                times.popleft()
        if len(self._retries) >= self.ratio * len(self._requests) + self.min_per_s * self.window_s:
            return False
        self._retries.append(now_s)
        return True


def backoff_s(round_: int, base_s: float, max_s: float, jitter: float) -> float:
    """How long to wait before round ``round_`` (from 1) over all candidates: doubling, capped, jittered.

    ``jitter`` in [0, 1) takes up to half away ("equal jitter"), so that clients do not come back in step.
    """
    return min(base_s * 2.0 ** (round_ - 1), max_s) * (1 - jitter / 2)
