"""How connections are accepted: by uvloop's loop, as `sollol proxy` has it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from proxy_addon import launcher, listening
from proxy_addon.listening import AT_ONCE, Served
from proxy_addon.sockets import BACKLOG


class Listener(socket.socket):
    """Has ``refusals`` to accept before it accepts."""

    refusals = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


@contextmanager
def listener() -> Iterator[Listener]:
    with Listener() as one:
        one.bind(("127.0.0.1", 0))
        one.listen(BACKLOG)
        one.setblocking(False)
        yield one


def connect(stack: ExitStack, one: socket.socket) -> None:
    stack.enter_context(socket.create_connection(one.getsockname(), timeout=10))


def run(main: Any) -> None:
    with asyncio.Runner(loop_factory=launcher._loop) as runner:
        runner.run(main)


def test_a_crowd_is_accepted_at_once_and_lets_others_have_their_turn() -> None:
    async def crowd() -> None:
        with listener() as one, ExitStack() as stack:
            taken: list[int] = []  # in which turn of the loop

            def serve(connection: socket.socket) -> None:
                stack.enter_context(connection)
                taken.append(turn)

            served = Served(asyncio.get_running_loop(), [one], serve)
            turn = 0
            served.begin()
            for _ in range(AT_ONCE + 10):  # the loop stands still meanwhile
                connect(stack, one)
            while len(taken) < AT_ONCE + 10:
                turn += 1
                await asyncio.sleep(0)
            counts = [taken.count(each) for each in sorted(set(taken))]
            assert counts == [AT_ONCE, 10]
            served.close()

    run(crowd())


def test_where_the_machine_refuses_nobody_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listening, "REST_S", 0.01)

    async def refused() -> None:
        with listener() as one, ExitStack() as stack:
            came: asyncio.Queue[socket.socket] = asyncio.Queue()
            served = Served(asyncio.get_running_loop(), [one], came.put_nowait)
            one.refusals = 2
            served.begin()
            connect(stack, one)
            async with asyncio.timeout(10):
                stack.enter_context(await came.get())
            served.close()

    with caplog.at_level(logging.ERROR):
        run(refused())
    assert [each.message for each in caplog.records] == [
        "No connection can be accepted for 0.01 s: [Errno 24] Too many open files"
    ] * 2


def test_who_has_connected_by_the_end_is_served_and_who_waits_for_a_successor_is_not() -> None:
    async def close() -> None:
        with listener() as begun, listener() as held, ExitStack() as stack:
            came: list[socket.socket] = []
            loop = asyncio.get_running_loop()
            first, second = Served(loop, [begun], came.append), Served(loop, [held], came.append)
            first.begin()
            address = begun.getsockname()
            for one in (begun, begun, held):
                connect(stack, one)
            first.close()
            second.close()
            assert [stack.enter_context(each).getsockname() for each in came] == [address] * 2

    run(close())
