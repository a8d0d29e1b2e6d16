"""How fast memory is read: that it is measured at all, when, and what is kept."""

import threading
from collections.abc import Iterator

import psutil
import pytest

from agent.bandwidth import BUFFER_BYTES, CPU_SHARE, KEPT, SPAN_S, MemoryBandwidth, read_bytes_s
from tests.agent.conftest import Clock


def test_it_measures_and_leaves_nothing() -> None:
    threads, held_bytes = threading.active_count(), psutil.Process().memory_info().rss
    # Anything that computes reads more than 10 MB/s, and no memory gives 100 TB/s.
    assert 1e7 < read_bytes_s(2, span_s=0.05) < 1e14
    assert threading.active_count() == threads
    assert psutil.Process().memory_info().rss - held_bytes < BUFFER_BYTES / 2


@pytest.mark.parametrize("threads", [1, 2, 5, 40])
def test_any_number_of_threads_reads_it(threads: int) -> None:
    assert read_bytes_s(threads, span_s=0.02, buffer_bytes=8 << 20) > 1e7


class Measured:
    """Measurements that were written down before."""

    def __init__(self, results: list[float]) -> None:
        self._results: Iterator[float] = iter(results)
        self.threads: list[int] = []

    def __call__(self, threads: int) -> float:
        self.threads.append(threads)
        return next(self._results)


def test_the_best_of_the_last_few_counts(clock: Clock) -> None:
    measured = Measured([40e9, *[20e9] * (KEPT - 1), 30e9])
    bandwidth = MemoryBandwidth(measured, threads=1, clock=clock)
    for _ in range(KEPT):
        assert bandwidth.read() == 40e9
        clock.now_s += 3600
    assert bandwidth.read() == 30e9


def test_it_costs_little_however_often_it_is_asked_and_however_many_cores(clock: Clock) -> None:
    measured = Measured([10e9] * 1000)
    bandwidth = MemoryBandwidth(measured, threads=64, clock=clock)
    asked_s = 0
    while asked_s < 86400:
        bandwidth.read()
        asked_s += 600
        clock.now_s += 600
    assert set(measured.threads) == {64}
    spent_s = len(measured.threads) * 64 * SPAN_S
    assert 0 < spent_s / 86400 < CPU_SHARE * 1.1
