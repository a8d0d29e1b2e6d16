"""One part: its deadline, its failures, and a thread that hangs."""

import asyncio
import logging
import threading

import psutil
import pytest

from agent.ollama.client import OllamaUnreachable
from agent.polled import Polled
from agent.worker import Worker
from tests.agent.conftest import Clock


class Script:
    """Reads that each end as told: a value, an exception, or (None) never."""

    def __init__(self, *ends: object) -> None:
        self._ends = list(ends)
        self.reads = 0

    async def __call__(self) -> object:
        self.reads += 1
        end = self._ends.pop(0)
        if end is None:
            await asyncio.Event().wait()
        if isinstance(end, Exception):
            raise end
        return end


def polled(script: Script, clock: Clock, deadline_s: float = 5) -> Polled[object]:
    return Polled("part", script, every_s=1, deadline_s=deadline_s, clock=clock)


async def test_a_failure_keeps_the_value_and_says_why_and_since_when(clock: Clock) -> None:
    part = polled(Script("a", OllamaUnreachable("refused"), "b"), clock)
    await part.refresh()
    assert (part.value, part.staleness(clock())) == ("a", None)
    clock.now_s += 7
    await part.refresh()
    assert (part.value, part.staleness(clock())) == ("a", "refused; last read 7 s ago")
    await part.refresh()
    assert (part.value, part.staleness(clock()), part.failures) == ("b", None, 1)


async def test_a_part_that_was_never_read_says_so(clock: Clock) -> None:
    part = polled(Script(psutil.AccessDenied(1)), clock)
    await part.refresh()
    assert part.value is None
    assert part.staleness(clock()) == f"{psutil.AccessDenied(1)}; never read"


async def test_a_read_that_does_not_come_back_is_given_up_at_the_deadline(clock: Clock) -> None:
    part = polled(Script(None), clock, deadline_s=0.01)
    await part.refresh()
    assert part.staleness(clock()) == "no answer within 0.01 s; never read"


async def test_a_bug_is_logged_once_with_its_trace(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    part = polled(Script(KeyError("x"), KeyError("x")), clock)
    with caplog.at_level(logging.ERROR):
        await part.refresh()
        await part.refresh()
    assert part.staleness(clock()) == "KeyError: 'x'; never read"
    (record,) = caplog.records
    assert record.exc_info is not None


async def test_cancelling_is_no_failure(clock: Clock) -> None:
    part = polled(Script(None), clock)
    task = asyncio.create_task(part.refresh())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert part.error is None


async def test_run_keeps_its_beat_and_skips_what_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    start_s, slept = clock.now_s, []
    durations = [0.25, 3.5, 0.0]

    async def read() -> None:
        clock.now_s += durations.pop(0)

    async def sleep(duration_s: float) -> None:
        slept.append(clock.now_s + duration_s - start_s)
        clock.now_s += duration_s
        if not durations:
            raise asyncio.CancelledError

    monkeypatch.setattr("agent.polled.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await Polled("part", read, every_s=1, deadline_s=9, clock=clock).run()
    assert slept == [1, 5, 6]


async def test_worker_hands_over_results_and_exceptions() -> None:
    ends: list[object] = [1, ValueError("no")]

    def function() -> object:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    worker = Worker(function, "test")
    assert await worker.call() == 1
    with pytest.raises(ValueError, match="no"):
        await worker.call()


async def test_worker_does_not_pile_up_calls_behind_one_that_hangs() -> None:
    released, calls = threading.Event(), []

    def function() -> int:
        calls.append(threading.current_thread().daemon)
        released.wait(30)
        return len(calls)

    worker = Worker(function, "test")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await worker.call()
    waiting = asyncio.create_task(worker.call())
    released.set()
    assert await waiting == 1  # the call that hung, not a fourth
    assert await worker.call() == 2
    assert calls == [True, True]  # daemons: a hung driver does not keep the process from ending


def test_worker_outlives_the_loop_that_asked() -> None:
    released = threading.Event()

    def function() -> str:
        released.wait(30)
        return "done"

    async def ask_and_leave() -> Worker[str]:
        worker = Worker(function, "test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await worker.call()
        return worker

    worker = asyncio.run(ask_and_leave())
    released.set()
    worker._running = None
    assert asyncio.run(worker.call()) == "done"
