"""How long answers are: learned as a distribution, for a mean says nothing of the one that runs and runs.

Lengths are counted in logarithmic buckets with forgetting, in four tables from the general to the particular:
the kind of task, the model, both, and both for one client. Each is drawn towards the one before it as if
that had been seen :data:`CONCENTRATION` times (Dirichlet smoothing with back-off, as in language models): a
new client's answers are expected to be like everybody's, an old one's like its own.

A client's cap on the output censors what it hides: a capped answer would have had at least so many tokens. It
is spread over the longer buckets as they are believed to be filled (Efron's "redistribution to the right",
one step of EM), so that capped answers teach neither too little nor nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from proxy_addon.endpoints import Task

if TYPE_CHECKING:
    from proxy_addon.ask import Ask

#: Before anything was seen: log-normal with the median of the conversations in Azure's inference trace (129;
#: Patel et al., "Splitwise", ISCA 2024) and the mean of LMSYS-Chat-1M's answers (214.5; Zheng et al., 2023).
PRIOR_MEDIAN_TOKENS = 129.0
PRIOR_MEAN_TOKENS = 214.5
CONCENTRATION = 2.0  #: answers of its own after which a table counts as much as the one that it falls back to
HALF_LIFE = 50  #: answers after which one is half forgotten
PER_OCTAVE = 4  #: buckets per doubling: a length is known to ±9 %
BUCKETS = 16 * PER_OCTAVE + 1  #: up to 65,536 tokens; the last holds all beyond
FADE = 0.5 ** (1 / HALF_LIFE)
FORGOTTEN = 1e-3  #: a smaller count is dropped
LARGEST_UNIT = 1e6  #: counts are brought back to a unit of 1 beyond it: once in 1,000 answers
MAX_TABLES = 2048  #: clients choose how many there are: the one unused for longest goes
STALE = 16  #: answers of others after which a cached distribution is made anew
STALE_SHARE = 1 / 16  #: of all that its own table knows, answers of its own after which it is as well
OVERRUN = 0.25  #: what is longer than all that was ever seen goes on for this share of its length

_VALUES = tuple(2 ** ((i + 0.5) / PER_OCTAVE) for i in range(BUCKETS))  #: the middle of each bucket
_EDGES = tuple(2 ** ((i + 1) / PER_OCTAVE) for i in range(BUCKETS - 1))  #: where each ends

Count = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e6)]
Bucket = Annotated[int, Field(ge=0, lt=BUCKETS)]


@dataclass(slots=True)
class Histogram:
    """Counts by bucket that fade with each answer.

    Not they become smaller, which would take as long as there are buckets, but what one answer counts larger.
    """

    counts: dict[Bucket, Count] = field(default_factory=dict)  #: in units of what the newest answer counts
    total: Count = 0.0  #: of all counts, in answers
    unit: Annotated[float, Field(allow_inf_nan=False, ge=1, le=LARGEST_UNIT)] = 1.0  #: what that is

    def add(self, share: Iterable[tuple[int, float]]) -> None:
        """Count one answer, of which ``share`` says how much falls into which bucket."""
        self.unit /= FADE
        if self.unit > LARGEST_UNIT:
            self.counts, self.unit = self._plain(), 1.0
        counts, unit, added = self.counts, self.unit, 0.0
        for bucket, part in share:
            counts[bucket] = counts.get(bucket, 0.0) + part * unit
            added += part
        self.total = self.total * FADE + added

    def plain(self) -> Histogram:
        """A copy in units of 1, for whoever keeps it; made in one step, beside a thread that counts."""
        return Histogram(self._plain(), self.total)

    def _plain(self) -> dict[int, float]:
        unit = self.unit
        found = {bucket: count / unit for bucket, count in self.counts.copy().items()}
        return {bucket: count for bucket, count in found.items() if count > FORGOTTEN}


class Distribution:
    """The probability of each bucket, summed up for quick answers."""

    __slots__ = ("below", "partial", "shares")

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares
        self.below = [0.0, *accumulate(shares)]  #: probability of the buckets before the i-th
        self.partial = [0.0, *accumulate(p * v for p, v in zip(shares, _VALUES, strict=True))]

    def mean_of(self, low: int, cap: float) -> float:
        """Mean of min(length, ``cap``) over the buckets from ``low`` on, times their probability."""
        high = max(bisect_left(_VALUES, cap), low)
        capped = cap * (self.below[-1] - self.below[high]) if high < BUCKETS else 0.0
        return self.partial[high] - self.partial[low] + capped


class Lengths:
    """How many tokens one answer may have, at most ``cap``."""

    __slots__ = ("_cap", "_of", "mean")

    def __init__(self, of: Distribution, cap: float = math.inf) -> None:
        self._of = of
        self._cap = cap
        self.mean = of.mean_of(0, cap) / of.below[-1]

    def capped(self, cap: float) -> Lengths:
        """The same answers under a cap of the client's."""
        return Lengths(self._of, cap)

    def quantile(self, q: float) -> float:
        """The length that a share ``q`` of the answers does not exceed."""
        below = self._of.below
        bucket = min(max(bisect_left(below, q * below[-1]) - 1, 0), BUCKETS - 1)
        return min(_VALUES[bucket], self._cap)

    def remaining(self, done_tokens: float) -> float:
        """Tokens still to expect of an answer that has ``done_tokens`` and goes on."""
        if done_tokens >= self._cap:
            return 0.0
        low = bisect_right(_VALUES, done_tokens)
        odds = self._of.below[-1] - self._of.below[low]
        if odds < 1e-9:  # longer than anything: rounding errors are no tail
            return min(OVERRUN * done_tokens, self._cap - done_tokens)
        return self._of.mean_of(low, self._cap) / odds - done_tokens


def _bucket(tokens: float) -> int:
    return bisect_right(_EDGES, tokens)


def _prior() -> Distribution:
    spread = math.sqrt(2 * math.log(PRIOR_MEAN_TOKENS / PRIOR_MEDIAN_TOKENS))
    normal = NormalDist(math.log(PRIOR_MEDIAN_TOKENS), spread)
    below = [0.0, *(normal.cdf(math.log(edge)) for edge in _EDGES), 1.0]
    return Distribution([high - low for low, high in pairwise(below)])


PRIOR = _prior()
_NOTHING = Lengths(PRIOR, 0.0)  #: of an answer without tokens


class OutputLengths:
    """The tables, and a cache of what follows from them: :meth:`of` is on the path of every decision."""

    def __init__(self, tables: dict[str, Histogram] | None = None) -> None:
        self.tables = tables if tables is not None else {}
        self._cache: dict[tuple[str, str, str], Lengths] = {}  # without a cap
        self._unread: dict[tuple[str, str, str], int] = {}  # answers that are not in the cached one
        self._seen = 0

    def of(self, ask: Ask) -> Lengths:
        """The lengths that an answer to ``ask`` may have."""
        if ask.load_only or ask.task is Task.EMBED:
            return _NOTHING
        key = (ask.kind, ask.key, ask.client)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= MAX_TABLES:
                self._cache.clear()
            found = self._cache[key] = Lengths(self._blend(_names(*key)))
        return found if ask.max_tokens is None else found.capped(ask.max_tokens)

    def observe(self, ask: Ask, tokens: int) -> None:
        """Learn from an answer to ``ask`` that had ``tokens``."""
        if ask.load_only or ask.task is Task.EMBED:
            return
        key = (ask.kind, ask.key, ask.client)
        names = _names(*key)
        bucket = _bucket(tokens)
        share = [(bucket, 1.0)]
        if ask.max_tokens is not None and tokens >= ask.max_tokens:
            share = _to_the_right(self._blend(names), bucket)
        for name in reversed(names):  # the general ones last: they are forgotten last
            table = self.tables.pop(name, None) or Histogram()
            table.add(share)
            self.tables[name] = table
        while len(self.tables) > MAX_TABLES:
            del self.tables[next(iter(self.tables))]
        self._seen += 1
        unread = self._unread.get(key, 0) + 1
        if self._seen % STALE == 0:
            self._cache.clear()
            self._unread.clear()
        elif unread >= self.tables[names[-1]].total * STALE_SHARE:
            self._cache.pop(key, None)
            self._unread.pop(key, None)
        else:
            self._unread[key] = unread

    def _blend(self, names: Sequence[str]) -> Distribution:
        left, seen = 1.0, []  # what each table leaves to those before it, the prior last
        for name in reversed(names):
            table = self.tables.get(name)
            if table is None or not table.total:
                continue
            whole = table.total + CONCENTRATION
            seen.append((table.counts, left / whole / table.unit))
            left *= CONCENTRATION / whole
        shares = [share * left for share in PRIOR.shares]
        for counts, weight in seen:
            for bucket, count in counts.items():
                shares[bucket] += count * weight
        return Distribution(shares)


@lru_cache(MAX_TABLES)
def _names(kind: str, model: str, client: str) -> tuple[str, ...]:
    """The tables to consult, the most general first. Neither kinds nor models have spaces in their names."""
    return kind, f"* {model}", f"{kind} {model}", f"{kind} {model} {client}"


def _to_the_right(believed: Distribution, bucket: int) -> list[tuple[int, float]]:
    odds = believed.below[-1] - believed.below[bucket]
    if odds < 1e-9:
        return [(bucket, 1.0)]
    return [(i, believed.shares[i] / odds) for i in range(bucket, BUCKETS) if believed.shares[i] > 0]
