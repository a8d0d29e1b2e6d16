"""How fast this machine reads its main memory: what bounds the tokens a CPU makes in a second.

To make a token every weight is read once and hardly anything is computed with it. So the measure is a read of
memory that no cache holds, by every thread that this process may use: ``memchr`` for a byte that is not
there, which touches each cache line once, writes nothing, and lets go of Python's lock. Each thread walks the
whole buffer round and round, from a place of its own, so that even on a machine of many small caches no
thread finds what it has just read. Where one cache is larger than the buffer (there are servers of that
kind), the figure is too high.

ggml reads its weights slower than this, because it decodes and multiplies them: it reached 0.4 (one
thread) to 0.55 (two) of the figure, measured with a 250 MB model in Q4_K_M on an AMD EPYC without AVX-512. It
is for comparing machines, and for a first estimate until a model has been seen to run.

A limit on CPU time (a cgroup's quota) counts: the measurement spans several of the kernel's accounting
periods, and the time in which a thread was held back is part of it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable

from agent.cpus import computing_threads

BUFFER_BYTES = 64 << 20
# One call of memchr, some tenths of a millisecond: short against a period, long against Python's own work.
CHUNK_BYTES = 4 << 20
# Five periods of the kernel's bandwidth control, 100 ms each (sched-bwc.rst).
SPAN_S = 0.5
# A neighbour's load lowers a measurement and nothing raises it, so the best of the last few is the truth.
KEPT = 6
EVERY_S = 600.0
# What measuring may cost in the long run: on a machine of many cores it is then done less often.
CPU_SHARE = 0.005


class MemoryBandwidth:
    """Measures now and then. :meth:`read` blocks for half a second when it does; call it in a thread."""

    def __init__(
        self,
        measure: Callable[[int], float] | None = None,
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._measure = measure or read_bytes_s
        self._threads = threads or computing_threads()
        self._clock = clock
        self._results: deque[float] = deque(maxlen=KEPT)
        self._due_at_s = float("-inf")

    def read(self) -> float:
        """Return bytes per second, the best of the last few measurements."""
        now_s = self._clock()
        if now_s >= self._due_at_s:
            self._due_at_s = now_s + self._threads * SPAN_S / CPU_SHARE
            self._results.append(self._measure(self._threads))
        return max(self._results)


def read_bytes_s(threads: int, span_s: float = SPAN_S, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Return how many bytes a second ``threads`` threads together read from memory."""
    with mmap.mmap(-1, buffer_bytes) as memory:
        start = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(start)
        # Pages that nobody has written are all the same page of zeros.
        ctypes.memset(address, 1, buffer_bytes)
        rate = _Readers(address, buffer_bytes, threads).run(span_s)
        del start  # the mapping cannot be closed while something points into it
    return rate


class _Readers:
    def __init__(self, address: int, buffer_bytes: int, threads: int) -> None:
        self._chunks = [address + offset for offset in range(0, buffer_bytes, CHUNK_BYTES)]
        self._read_chunks = [0] * threads
        self._starting = threading.Barrier(threads + 1)
        self._until_s = 0.0
        self._memchr = ctypes.CDLL(None).memchr
        self._memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._memchr.restype = ctypes.c_void_p

    def run(self, span_s: float) -> float:
        count = len(self._read_chunks)
        workers = [threading.Thread(target=self._walk, args=(n,), daemon=True) for n in range(count)]
        for worker in workers:
            worker.start()
        began_s = time.perf_counter()
        self._until_s = began_s + span_s
        self._starting.wait()
        for worker in workers:
            worker.join()
        return sum(self._read_chunks) * CHUNK_BYTES / (time.perf_counter() - began_s)

    def _walk(self, number: int) -> None:
        chunks = self._chunks
        at = number * len(chunks) // len(self._read_chunks)
        self._starting.wait()
        while time.perf_counter() < self._until_s:
            self._memchr(chunks[at], 0, CHUNK_BYTES)
            self._read_chunks[number] += 1
            at = (at + 1) % len(chunks)
