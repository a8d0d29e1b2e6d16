"""How much is read in a turn of the loop, on uvloop as `sollol proxy` has it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import cast

import pytest

from proxy_addon import launcher
from proxy_addon.lane.inflow import LARGE_BYTES, Inflow

BODY = b"".join(i.to_bytes(4, "big") for i in range(8 << 20))  # 32 MB: far more than the kernel holds
BOUND_S = 60.0


class Reader(Inflow):
    """Notes what came, and in which turn of the loop the large pieces did."""

    def __init__(self) -> None:
        self.came = bytearray()
        self.large_in: list[int] = []
        self.turn = 0
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._tick()

    def _tick(self) -> None:
        self.turn += 1
        if not self.ended.done():
            asyncio.get_running_loop().call_soon(self._tick)

    def data_received(self, data: bytes) -> None:
        self.came += data
        if len(data) >= LARGE_BYTES:
            self.large_in.append(self.turn)
            self.rest_until_next_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(exc)


@contextmanager
def sent() -> Iterator[socket.socket]:
    """A connection on which :data:`BODY` comes as fast as it is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = socket.create_connection(server.getsockname())
        sink, _ = server.accept()
    sink.setblocking(False)

    def send() -> None:
        with source, suppress(OSError):  # hung up on
            source.sendall(BODY)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield sink
    finally:
        sink.close()
        sender.join(BOUND_S)


async def connected[P: asyncio.Protocol](protocol: P, sink: socket.socket) -> P:
    await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, sink)
    return protocol


async def turns(until: Callable[[], object]) -> None:
    """Let the loop go on until ``until``, then for many turns more."""
    async with asyncio.timeout(BOUND_S):
        while not until():
            await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)


def run[T](main: Callable[[socket.socket], Awaitable[T]]) -> T:
    async def bounded(sink: socket.socket) -> T:
        async with asyncio.timeout(BOUND_S):
            return await main(sink)

    with sent() as sink, asyncio.Runner(loop_factory=launcher._loop) as runner:
        return runner.run(bounded(sink))


def is_body(came: bytes | bytearray) -> bool:
    return sha256(came).digest() == sha256(BODY).digest()


def test_others_have_a_turn_between_any_two_large_pieces() -> None:
    async def main(sink: socket.socket) -> Reader:
        reader = await connected(Reader(), sink)
        await reader.ended
        return reader

    reader = run(main)

    assert is_body(reader.came)
    assert len(reader.large_in) > 10
    assert len(set(reader.large_in)) == len(reader.large_in)


@pytest.mark.parametrize("paused", ["in_the_turn_of_a_large_piece", "in_any"])
def test_who_is_paused_stays_so_until_resumed(paused: str) -> None:
    class Pauses(Reader):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if paused == "in_the_turn_of_a_large_piece" and len(self.large_in) == 3:
                self.pause()

    async def main(sink: socket.socket) -> Reader:
        reader = await connected(Pauses(), sink)
        await turns(lambda: len(reader.large_in) >= 3)
        reader.pause()
        at_pause = len(reader.came)
        await turns(lambda: True)
        assert len(reader.came) == at_pause < len(BODY)
        reader.resume()
        await reader.ended
        return reader

    assert is_body(run(main).came)


class Next(asyncio.Protocol):
    """Is handed a connection."""

    def __init__(self) -> None:
        self.came = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.came += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(exc)


class HandsOver(Reader):
    """Hands its connection to ``following`` when a large piece has come."""

    def __init__(self, *, pause: bool) -> None:
        super().__init__()
        self.following = Next()
        self._pause = pause

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.large_in:
            self.hand_to(self.following)
            self.ended.set_result(None)
            if self._pause:
                self.transport.pause_reading()


def test_what_is_handed_over_is_read_on_by_its_next_owner() -> None:
    async def main(sink: socket.socket) -> bytearray:
        reader = await connected(HandsOver(pause=False), sink)
        await reader.ended
        await reader.following.ended
        return reader.came + reader.following.came

    assert is_body(run(main))


def test_what_is_handed_over_is_not_read_on_for_its_former_owner() -> None:
    """Its next owner has paused it; who reads it then fills his memory."""

    async def main(sink: socket.socket) -> int:
        reader = await connected(HandsOver(pause=True), sink)
        await turns(reader.ended.done)
        reader.transport.abort()
        return len(reader.following.came)

    assert run(main) == 0
