"""A kept connection at the end of its time: whoever has sent a request by then is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from mitmproxy.connection import Client

from proxy_addon.clients import Clients
from proxy_addon.lane.client import ClientConnection
from proxy_addon.lane.front import Front
from proxy_addon.settings import Settings


class Line(asyncio.Transport):
    """A connection that is open until it is closed."""

    closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Without a buffer."""

    def resume_reading(self) -> None:
        """Always reading."""

    def close(self) -> None:
        self.closed = True


class Limits:
    """The limit that was set last."""

    due: Callable[[], object]
    pending = False

    def __contains__(self, _key: object) -> bool:
        return self.pending

    def set(self, _key: object, _delay_s: float, due: Callable[[], object]) -> None:
        self.due = due

    def clear(self, _key: object) -> None:
        """Nobody asks."""


class Door:
    """What a connection asks its front."""

    settings, idle_limit_s = Settings(), 1.0

    def __init__(self) -> None:
        clients = Clients(lambda: 9)
        self.deadlines = Limits()
        self.idle, self.busy, self.is_idle = clients.idle, clients.busy, clients.is_idle
        self.opened = lambda connection: clients.enter(connection, connection.close)

    def client_of(self, _transport: Any) -> Client:
        return Client(peername=("127.0.0.1", 1), sockname=("127.0.0.1", 2))


@pytest.mark.parametrize("comes", [b"", b"GET /api/ver"])
async def test_what_came_while_the_loop_was_late_is_read_before_anything_is_closed(comes: bytes) -> None:
    door, line = Door(), Line()
    connection = ClientConnection(cast(Front, door))
    connection.connection_made(line)
    door.deadlines.due()
    if comes:  # the loop reads what came in the turn in which the time was over
        connection.data_received(comes)
    await asyncio.sleep(0)
    assert line.closed is not bool(comes)


async def test_whoever_was_answered_meanwhile_may_be_idle_anew() -> None:
    door, line = Door(), Line()
    ClientConnection(cast(Front, door)).connection_made(line)
    door.deadlines.due()
    door.deadlines.pending = True
    await asyncio.sleep(0)
    assert not line.closed
