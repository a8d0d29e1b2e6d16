"""What is counted with every request: a sum or a histogram by labels, as Prometheus reads them.

prometheus-client's own take a lock and look labels up each time, for threads that the proxy does not have;
of a small request that was a twentieth. These count in a dict, and are made into samples at each scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from time import time

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Total(Collector):
    """A counter. Labels are given in the order of ``names``."""

    def __init__(self, name: str, text: str, names: Sequence[str]) -> None:
        self._name, self._text, self._names = name, text, tuple(names)
        self._counts: dict[Labels, float] = {}
        self._since: dict[Labels, float] = {}  # when each was counted first, as Prometheus wants to know

    def add(self, labels: Labels, count: float = 1.0) -> None:
        """Count so many more."""
        if labels in self._counts:
            self._counts[labels] += count
        else:
            self._counts[labels], self._since[labels] = float(count), time()

    def collect(self) -> Iterator[Metric]:
        """One family."""
        family = CounterMetricFamily(self._name, self._text, labels=self._names)
        for labels, count in self._counts.items():
            family.add_metric(labels, count, created=self._since[labels])
        yield family


class Spread(Collector):
    """A histogram. ``bounds_s`` are the upper bounds of its buckets, which include them, but for the last."""

    def __init__(self, name: str, text: str, names: Sequence[str], bounds_s: Sequence[float]) -> None:
        self._name, self._text, self._names = name, text, tuple(names)
        self._bounds_s = tuple(bounds_s)
        self._says = (*map(floatToGoString, bounds_s), "+Inf")
        self._counts: dict[Labels, list[int]] = {}  # of each bucket, those below not included
        self._sums_s: dict[Labels, float] = {}
        self._since: dict[Labels, float] = {}

    def add(self, labels: Labels, seconds: float) -> None:
        """Take in one value."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * len(self._says)
            self._sums_s[labels], self._since[labels] = 0.0, time()
        counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sums_s[labels] += seconds

    def collect(self) -> Iterator[Metric]:
        """One family."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._names)
        for labels, counts in self._counts.items():
            buckets = [(bound, float(n)) for bound, n in zip(self._says, accumulate(counts), strict=True)]
            family.add_metric(labels, buckets, self._sums_s[labels])
            named = dict(zip(self._names, labels, strict=True))
            family.add_sample(f"{self._name}_created", named, self._since[labels])
        yield family
