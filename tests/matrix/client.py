"""A strict client: one connection, every byte of an answer parsed by h11, sending while it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import h11

READ_BYTES = 1 << 18


@dataclass
class Seen:
    """What came for one request."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False  #: the body ended as its head had said
    problem: str = ""  #: what was wrong on the wire


class Client:
    """``async with Client(port) as client: seen = await client.ask(…)``; requests one after the other."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self._port, self._source = port, source
        self._h11 = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, local_addr=(self._source, 0), limit=1 << 20
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    @property
    def reusable(self) -> bool:
        """Whether the last answer left the connection fit for another request."""
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    async def ask(
        self, method: str, path: str, body: bytes = b"", on_body: Callable[[bytes], None] | None = None
    ) -> Seen:
        """Send one request and take its answer, whatever ends it; ``on_body`` is told its body so far."""
        if self._h11.our_state is not h11.IDLE:
            self._h11.start_next_cycle()
        headers = [("Host", "localhost"), ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=path, headers=headers)
        sent = [self._h11.send(request), body]
        if body:
            self._h11.send(h11.Data(data=body))
        sent.append(self._h11.send(h11.EndOfMessage()))
        sending = asyncio.create_task(self._send([piece for piece in sent if piece]))
        seen = Seen()
        try:
            await self._receive(seen, on_body)
            if self.reusable:
                await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return seen

    async def _send(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()

    async def _receive(self, seen: Seen, on_body: Callable[[bytes], None] | None) -> None:
        body: list[bytes] = []
        try:
            while not seen.ended:
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    self._h11.receive_data(await self._reader.read(READ_BYTES))
                elif isinstance(event, h11.Response):
                    seen.status = event.status_code
                    seen.headers = {name.decode(): value.decode() for name, value in event.headers}
                elif isinstance(event, h11.Data):
                    body.append(bytes(event.data))
                    if on_body is not None:
                        on_body(b"".join(body))
                elif isinstance(event, h11.EndOfMessage):
                    seen.ended = True
                elif isinstance(event, h11.ConnectionClosed):
                    seen.problem = "closed without an answer"
                    return
        except (h11.RemoteProtocolError, OSError) as problem:
            seen.problem = str(problem) or type(problem).__name__
        finally:
            seen.body = b"".join(body)
        if self._h11.trailing_data[0]:
            seen.problem = f"after the answer came {self._h11.trailing_data[0][:40]!r}"
