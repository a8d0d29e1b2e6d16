"""Limits that are set and cleared in any order come due once, in order, and leave nothing behind."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_addon.deadlines import SPARE, Deadlines
from tests.sim.virtual import VirtualLoop

STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "clear", "wait"]), st.integers(0, 5), st.integers(0, 20)), max_size=60
)


@given(STEPS)
@settings(deadline=None)
def test_each_limit_comes_due_at_its_time_unless_it_was_cleared(steps: list[tuple[str, int, int]]) -> None:
    async def run() -> None:
        loop, deadlines = asyncio.get_running_loop(), Deadlines()
        due: list[tuple[int, float]] = []
        expected: list[tuple[int, float]] = []
        standing: dict[int, float] = {}

        def pass_until(at_s: float) -> None:
            for key, when in sorted(standing.items(), key=lambda each: each[1]):
                if when <= at_s:
                    expected.append((key, when))
                    del standing[key]

        for what, key, number in steps:
            if what == "set":
                deadlines.set(key, number + 0.5, lambda key=key: due.append((key, loop.time())))
                standing[key] = loop.time() + number + 0.5
            elif what == "clear":
                deadlines.clear(key)
                standing.pop(key, None)
            else:
                await asyncio.sleep(number)
                pass_until(loop.time())
        await asyncio.sleep(100)
        pass_until(loop.time())
        assert sorted(due) == sorted(expected)
        assert [at_s for _, at_s in due] == sorted(at_s for _, at_s in due)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(run())


async def test_limits_that_are_cleared_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.set(number, 600, lambda: None)
        deadlines.clear(number)
    assert len(deadlines._heap) <= SPARE + 1
    assert deadlines._timer is not None
    deadlines._timer.cancel()


async def test_a_limit_that_fails_stops_no_other() -> None:
    deadlines, reached, heard = Deadlines(), asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["exception"]))
    deadlines.set("a", 0, lambda: 1 / 0)
    deadlines.set("b", 0, reached.set)
    async with asyncio.timeout(10):
        await reached.wait()
    assert [type(each) for each in heard] == [ZeroDivisionError]
