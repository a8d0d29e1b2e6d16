"""The admission of requests on a modelled fleet in virtual time: who is started, where, and when."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_addon.admission.limits import Refused
from proxy_addon.admission.waiter import Waiter
from proxy_addon.placement.decision import Decision
from proxy_addon.settings import Admission as Settings
from tests.proxy.admission.modelled import Modelled, now_s
from tests.proxy.placement.worlds import ask, name, report, resident, row
from tests.sim.virtual import run

REQUESTS = st.lists(
    st.tuples(
        st.floats(0.0, 2.0),  # after the one before
        st.sampled_from("abc"),
        st.integers(1, 10),
        st.floats(0.1, 5.0),  # how long it takes
        st.one_of(st.none(), st.floats(0.1, 3.0)),  # when its client leaves, if it still waits
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("policy", ["finish_time", "score", "least_loaded", "round_robin"])
@given(requests=REQUESTS, slots=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_nobody_is_lost_no_slot_is_idle_and_none_is_overfull(
    policy: str, requests: list[tuple[float, str, int, float, float | None]], slots: list[int]
) -> None:
    """Work conservation: on equal nodes somebody waits only while every slot is taken.

    ``finish_time`` may wait for a slot without neighbours, so there its nodes have one each.
    """
    if policy == "finish_time":
        slots = [1 for _ in slots]

    async def main() -> None:
        world = Modelled(policy=policy)
        for number, count in enumerate(slots):
            world.node(number, count)
        left: list[str] = []
        tasks = []

        def leave(waiter: Waiter) -> None:
            if waiter in world.admission.line:
                world.admission.withdraw(waiter)
                left.append(waiter.id)

        for number, (gap_s, client, priority, takes_s, leaves_s) in enumerate(requests):
            await asyncio.sleep(gap_s)
            waiter = world.waiter(f"{number}", client, priority)
            world.takes_s[waiter.id] = takes_s
            tasks.append(asyncio.create_task(world.admission.admit(waiter)))
            if leaves_s is not None:
                asyncio.get_running_loop().call_later(leaves_s, leave, waiter)
            for _ in range(4):  # tasks, the pass and its answers have had their turns
                await asyncio.sleep(0)
            taken = sum(len(n.flights) for n in world.fleet)
            assert not len(world.admission.line) or taken == sum(slots)
        await world.idle()
        decisions = await asyncio.gather(*tasks)
        assert sorted(world.started + left) == sorted(str(number) for number in range(len(requests)))
        assert sorted(world.ended) == sorted(world.started)
        assert [d is None for d in decisions].count(True) == len(left)
        for n, count in zip(world.fleet, slots, strict=True):
            assert world.most[n.name] <= count
        flows = defaultdict(list)
        for one in world.started:
            flows[requests[int(one)][1:3]].append(int(one))
        assert all(flow == sorted(flow) for flow in flows.values())

    run(main())


def test_a_free_node_is_given_at_once_without_a_turn_of_the_loop() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        world.takes_s["x"] = 1.0
        coroutine = world.admission.admit(world.waiter("x"))
        with pytest.raises(StopIteration) as ended:
            coroutine.send(None)
        assert ended.value.value.node == name(1)
        await world.idle()

    run(main())


def test_who_waits_is_served_by_the_node_that_comes_free_and_not_by_the_one_that_looked_best() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(
            1, report=report(bandwidth=900e9)
        )  # faster, but its answer takes much longer than expected
        world.node(2, report=report(bandwidth=800e9))
        await world.ask("long", takes_s=100.0)
        await world.ask("short", takes_s=5.0)
        assert (world.where["long"], world.where["short"]) == (name(1), name(2))
        await world.ask("late")
        assert world.where["late"] == name(2)
        assert now_s() == 5.0

    run(main())


def test_a_node_that_joins_serves_who_waits() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        await world.ask("first", takes_s=1000.0)
        waiting = asyncio.create_task(world.ask("second"))
        await asyncio.sleep(3.0)
        world.fleet.news(world.node(2))
        await waiting
        assert (world.where["second"], now_s()) == (name(2), 3.0)

    run(main())


def test_it_had_better_wait_for_a_fast_node_than_take_a_slow_one() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1, report=report(bandwidth=1000e9))
        world.node(2, report=report(bandwidth=20e9))
        await world.ask("first", takes_s=1.0)
        await world.ask("second")
        assert world.where == {"first": name(1), "second": name(1)}

    run(main())


def test_who_is_behind_does_not_count_on_the_slot_that_is_another_s_soon() -> None:
    """The fast node is worth a wait for one, not for ten: the others take the slow one, too."""

    async def main() -> None:
        world = Modelled()
        world.node(1, report=report(bandwidth=1000e9))
        world.node(2, report=report(bandwidth=250e9))
        await asyncio.gather(*(world.ask(str(number)) for number in range(10)))
        assert set(world.where.values()) == {name(1), name(2)}

    run(main())


def test_many_who_had_better_wait_do_not_hide_one_behind_them_that_need_not() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1, report=report(bandwidth=1000e9))
        world.node(2, report=report(bandwidth=1e9))  # free, and too slow for any of them
        world.node(3, models={"other": row(digest="e")}, resident={"other": resident()})
        await world.ask("first", takes_s=50.0)
        tasks = [asyncio.create_task(world.ask(f"{number}", client="c")) for number in range(100)]
        await asyncio.sleep(0.5)
        await world.ask("other", about=ask("other", max_tokens=100), client="c")
        assert (world.where["other"], now_s()) == (name(3), 0.5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    run(main())


def test_places_that_are_kept_leave_no_trace() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1, report=report(bandwidth=1000e9))
        slow = world.node(2, report=report(bandwidth=20e9))
        await world.ask("first")
        tasks = [asyncio.create_task(world.ask(str(number))) for number in range(5)]
        for _ in range(4):
            await asyncio.sleep(0)
        for n in world.fleet:
            real = [one for one in world.started if world.where[one] == n.name and one not in world.ended]
            assert len(n.flights) == len(real) == n.in_use["m"]
            assert n.work_s == pytest.approx(sum(f.service_s or 0.0 for f in n.flights))
        assert slow.turn == 0 and not slow.loads
        await asyncio.gather(*tasks)

    run(main())


@pytest.mark.parametrize("slots", [1, 2])
def test_a_load_is_not_put_off_for_ever_by_those_who_need_none(slots: int) -> None:
    """An endless stream for the model in memory: it goes on while a switch costs more than the wait."""

    async def main() -> None:
        world = Modelled()
        small = world.node(
            1, slots, models={"m": row(4), "other": row(4, digest="e")}, report=report(gpu_gib=8, free_gib=3)
        )
        switched_s = None

        async def stream(takes_s: float) -> None:
            number = 0
            while switched_s is None:
                number += 1
                await world.ask(f"m{takes_s}-{number}", takes_s=takes_s, client="m")

        streams = [asyncio.create_task(stream(takes_s)) for takes_s in (0.5, 0.6, 0.7, 0.8)]
        await asyncio.sleep(1.0)
        decision = await world.ask("other", about=ask("other", max_tokens=100), client="o")
        switched_s = now_s()
        assert decision is not None and decision.row is not None and decision.row.load_s > 0
        load_s = decision.row.load_s + decision.row.evict_s
        assert 1.0 + load_s <= switched_s <= 1.0 + 2 * load_s + 2.0
        assert small.name == decision.node
        await asyncio.gather(*streams)

    run(main())


def test_who_comes_back_goes_before_who_came_later() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        failed = world.waiter("failed")
        world.takes_s["failed"] = 1.0
        await world.admission.admit(failed)
        later = [asyncio.create_task(world.ask(str(number))) for number in range(3)]
        await asyncio.sleep(0.5)
        back = asyncio.create_task(world.admission.admit(failed))
        await asyncio.gather(back, *later)
        assert world.started[:3] == ["failed", "failed", "0"]

    run(main())


def test_nobody_may_serve_it_is_said_at_once_and_while_it_waits() -> None:
    async def main() -> None:
        world = Modelled()
        only = world.node(1)
        assert (await world.ask("x", about=ask("nothing"))).node is None  # type: ignore[union-attr]
        await world.ask("first", takes_s=50.0)
        waiting = asyncio.create_task(world.ask("second"))
        await asyncio.sleep(1.0)
        only.poll_error = "refused"
        world.fleet.lost(only, "refused")
        decision = await waiting
        assert decision is not None and decision.node is None
        assert now_s() == 1.0

    run(main())


def test_a_node_that_is_back_from_its_ejection_is_used_without_any_event() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        world.node(2).health.failed(0.0, "reset", fatal=True)  # for two seconds
        await world.ask("first", takes_s=50.0)
        await world.ask("second")
        assert world.where["second"] == name(2)
        assert 2.0 <= now_s() <= 2.1

    run(main())


def test_slots_that_are_not_known_are_put_to_trial_where_others_wait() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1, parallel_known=False)
        await world.ask("first", takes_s=10.0)
        await world.ask("second", takes_s=10.0)
        assert now_s() == 0.0
        third = asyncio.create_task(world.ask("third"))
        await asyncio.sleep(5.0)
        assert not third.done()
        await third

    run(main())


def test_limits_of_the_line() -> None:
    async def main() -> None:
        world = Modelled(Settings(max_queue=2, max_wait_s=5, ahead_s=0))
        world.node(1)
        await world.ask("first", takes_s=100.0)
        waiting = [asyncio.create_task(world.ask(str(number))) for number in range(2)]
        await asyncio.sleep(1.0)
        with pytest.raises(Refused) as full:
            await world.ask("one too many")
        assert (full.value.status, full.value.reason) == (503, "queue_full")
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, Refused) and outcome.reason == "max_wait"
        assert now_s() == 5.0
        assert not len(world.admission.line)

    run(main())


def test_at_the_end_who_waits_is_refused_and_who_comes_back_is_still_served() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        await world.ask("first", takes_s=3.0)
        waiting = asyncio.create_task(world.ask("second"))
        await asyncio.sleep(1.0)
        world.admission.close()
        with pytest.raises(Refused) as ending:
            await waiting
        assert (ending.value.reason, now_s()) == ("shutdown", 1.0)
        with pytest.raises(Refused):
            await world.ask("third")
        await asyncio.sleep(3.0)
        assert await world.ask("back") is not None

    run(main())


def test_a_fault_in_one_decision_keeps_nobody_else_waiting() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        decide = world.admission._decide

        def faulty(waiter: Waiter, closed: Mapping[str, str]) -> Decision:
            if waiter.id == "bad" and waiter in world.admission.line:
                raise ZeroDivisionError
            return decide(waiter, closed)

        world.admission._decide = faulty
        await world.ask("first")
        bad, good = await asyncio.gather(
            world.ask("bad", priority=10), world.ask("good"), return_exceptions=True
        )
        assert isinstance(bad, ZeroDivisionError)
        assert isinstance(good, Decision) and good.node == name(1)

    run(main())


def test_a_cancelled_wait_leaves_the_line() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1)
        await world.ask("first")
        waiting = asyncio.create_task(world.ask("second"))
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert not len(world.admission.line)
        await world.idle()
        assert world.started == ["first"]

    run(main())


def test_what_is_to_be_expected_grows_with_the_work_ahead() -> None:
    async def main() -> None:
        world = Modelled()
        world.node(1, resident={"m": resident()})
        await world.ask("first", takes_s=10.0)
        tasks = [asyncio.create_task(world.ask(str(number), takes_s=0.1)) for number in range(3)]
        await asyncio.sleep(1.0)
        rows = list(world.admission.standings())
        assert [one.waiter.id for one in rows] == ["0", "1", "2"]
        assert [one.position for one in rows] == [one.waiter.position for one in rows] == [1, 2, 3]
        assert [one.waited_s for one in rows] == [1.0] * 3
        expected = [one.expected_wait_s for one in rows]
        assert 0 < expected[0] < expected[1] < expected[2]
        await asyncio.gather(*tasks)

    run(main())
