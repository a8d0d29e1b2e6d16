"""When models are loaded, shared, reloaded and unloaded; the process itself is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shard.gguf import Header
from shard.llama_server import Launch, LlamaServerError
from shard.models import ServedModel
from shard.runners import Runner, Runners

A, B, C = (
    ServedModel(name, Header(Path(name), 1, {}, ()), "0" * 64, datetime.now(UTC)) for name in ("a", "b", "c")
)


def launch(model: ServedModel, num_ctx: int = 8) -> Launch:
    return Launch(model.header.path, num_ctx)


class StandIn:
    """What Runners needs of a LlamaServer."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def stop(self) -> None:
        if not self.exited.done():
            self.exited.set_result(0)

    def obituary(self) -> str:
        return "died"


class Processes:
    """Starts stand-ins; a load ends when its event is set."""

    def __init__(self) -> None:
        self.started: list[Launch] = []
        self.abandoned: list[Launch] = []
        self.alive: list[StandIn] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.failure: LlamaServerError | None = None

    async def start(self, model: ServedModel, launch: Launch) -> StandIn:
        self.started.append(launch)
        try:
            await self.may_load.wait()
        except asyncio.CancelledError:
            self.abandoned.append(launch)
            raise
        if self.failure:
            raise self.failure
        self.alive.append(StandIn(launch))
        return self.alive[-1]


@pytest.fixture
def processes() -> Processes:
    return Processes()


@pytest.fixture
async def runners(processes: Processes) -> AsyncIterator[Runners]:
    made = Runners(processes.start, max_loaded=2)  # type: ignore[arg-type]
    yield made
    await made.close()


class Request:
    """A request that holds its lease until it is told to go."""

    def __init__(
        self, runners: Runners, model: ServedModel, num_ctx: int = 8, keep_alive_s: float | None = None
    ) -> None:
        self.admitted = asyncio.Event()
        self.go = asyncio.Event()
        self.runner: Runner | None = None
        self.task = asyncio.create_task(self._run(runners, model, num_ctx, keep_alive_s))

    async def _run(
        self, runners: Runners, model: ServedModel, num_ctx: int, keep_alive_s: float | None
    ) -> None:
        async with runners.lease(model, launch(model, num_ctx), keep_alive_s) as self.runner:
            self.admitted.set()
            await self.go.wait()

    async def finish(self) -> None:
        self.go.set()
        await self.task


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def names(runners: Runners) -> set[str]:
    return {runner.model.name for runner in runners.loaded()}


async def run(runners: Runners, model: ServedModel, **given: float) -> None:
    request = Request(runners, model, **given)  # type: ignore[arg-type]
    await request.finish()


async def test_requests_share_one_load(runners: Runners, processes: Processes) -> None:
    processes.may_load.clear()
    requests = [Request(runners, A) for _ in range(3)]
    await settled()
    assert runners.loaded() == [], "a model that still loads is not listed"
    processes.may_load.set()
    for request in requests:
        await request.finish()
    assert processes.started == [launch(A)]
    assert names(runners) == {"a"}


async def test_a_reload_waits_for_the_answer_in_flight(runners: Runners, processes: Processes) -> None:
    first = Request(runners, A)
    await first.admitted.wait()
    second = Request(runners, A, num_ctx=16)
    await settled()
    assert processes.started == [launch(A)]
    await first.finish()
    await second.admitted.wait()
    assert processes.started == [launch(A), launch(A, 16)]
    assert processes.alive[0].exited.done()
    await second.finish()


async def test_the_idle_model_that_expires_first_makes_room(runners: Runners, processes: Processes) -> None:
    await run(runners, A, keep_alive_s=500)
    await run(runners, B, keep_alive_s=100)
    await run(runners, C)
    assert names(runners) == {"a", "c"}


async def test_a_busy_model_is_never_evicted(runners: Runners, processes: Processes) -> None:
    busy = [Request(runners, A), Request(runners, B)]
    for request in busy:
        await request.admitted.wait()
    third = Request(runners, C)
    await settled()
    assert not third.admitted.is_set() and names(runners) == {"a", "b"}
    await busy[1].finish()
    await third.admitted.wait()
    assert names(runners) == {"a", "c"}
    await busy[0].finish()
    await third.finish()


async def test_the_last_explicit_keep_alive_wins(runners: Runners, processes: Processes) -> None:
    await run(runners, A, keep_alive_s=0.01)
    await asyncio.wait_for(processes.alive[0].exited, 10)
    await settled()
    assert names(runners) == set()
    await run(runners, A, keep_alive_s=float("inf"))
    await run(runners, A)
    [runner] = runners.loaded()
    assert runner.timer is None and runner.expires_at.year > 2200


async def test_keep_alive_zero_unloads_when_the_last_request_is_done(
    runners: Runners, processes: Processes
) -> None:
    one, two = Request(runners, A, keep_alive_s=0), Request(runners, A)
    await two.admitted.wait()
    await one.finish()
    await settled()
    assert names(runners) == {"a"}
    await two.finish()
    await settled()
    assert names(runners) == set() and processes.alive[0].exited.done()


async def test_unload_waits_for_nobody_but_spares_the_busy(runners: Runners, processes: Processes) -> None:
    request = Request(runners, A)
    await request.admitted.wait()
    await runners.unload(A)
    assert names(runners) == {"a"}
    await request.finish()
    await settled()
    assert names(runners) == set()
    await runners.unload(A)
    await runners.unload(B)


async def test_a_failed_load_fails_its_waiters_and_is_tried_again(
    runners: Runners, processes: Processes
) -> None:
    processes.failure = LlamaServerError("no")
    for _ in range(2):
        with pytest.raises(LlamaServerError, match="no"):
            await run(runners, A)
        await settled()
    assert len(processes.started) == 2
    processes.failure = None
    await run(runners, A)
    assert names(runners) == {"a"}


async def test_a_load_goes_on_for_the_one_who_stays_and_ends_with_the_last(
    runners: Runners, processes: Processes
) -> None:
    processes.may_load.clear()
    leaves, stays = Request(runners, A), Request(runners, A)
    await settled()
    leaves.task.cancel()
    await settled()
    assert processes.abandoned == []
    stays.task.cancel()
    await settled()
    assert processes.abandoned == [launch(A)]
    processes.may_load.set()
    await run(runners, A)
    assert names(runners) == {"a"}


async def test_a_process_that_dies_is_replaced_while_its_requests_still_end(
    runners: Runners, processes: Processes
) -> None:
    old = Request(runners, A)
    await old.admitted.wait()
    processes.alive[0].exited.set_result(-9)
    await settled()
    new = Request(runners, A)
    await asyncio.wait_for(new.admitted.wait(), 10)
    assert len(processes.started) == 2
    await old.finish()
    await settled()
    assert names(runners) == {"a"}, "the old request's end does not touch the new process"
    await new.finish()
