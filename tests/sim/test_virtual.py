"""Virtual time: hours pass at once, in order, and a program that would hang says so."""

from __future__ import annotations

import asyncio

import pytest

from tests.sim import virtual


def test_hours_pass_in_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop, seen = asyncio.get_running_loop(), []

        async def after(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, loop.time()))

        await asyncio.gather(after(7200, "late"), after(0, "now"), after(0.5, "soon"))
        return seen

    assert virtual.run(main()) == [("now", 0.0), ("soon", 0.5), ("late", 7200.0)]


def test_time_stands_still_while_there_is_work() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert virtual.run(main()) == 0.0


def test_timeouts_are_virtual() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert virtual.run(main()) == 3600.0


def test_a_deadlock_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(virtual.Deadlock):
        virtual.run(main())
