"""An HTTP/1.1 server that controls every byte: requests are parsed by h11, responses are written by hand.

It cancels the handler the moment the client leaves, writes one chunk per object, answers HEAD, tolerates an
answer before the body was read (as Go's server does), and acts out a :class:`~tests.fakes.faults.Fault`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import h11

from tests.fakes.clock import clock_s
from tests.fakes.exchange import Aborted, Exchange, Notice, Received
from tests.fakes.faults import GARBAGE, SHAPING, Fault, Moment

DISCARD_BYTES = 256 << 10  # what Go's server reads of an unread body before it closes instead
LINGER_S = 0.5  # Go's rstAvoidanceDelay (net/http/server.go)


class Connection(asyncio.Protocol):
    """One accepted connection: parses requests, runs one handler at a time, notices the client's leaving."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._h11 = h11.Connection(h11.SERVER)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._reading = True

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._server.connections.add(self)
        self._server.accepted += 1
        self._server.notice()
        fault = self._server.claim_connection_fault("connect")
        if fault is not None:
            return self._fail(fault)
        if self._server.accept_delay_s is not None:
            self.pause_reading()
            if self._server.accept_delay_s != float("inf"):
                loop = asyncio.get_running_loop()
                loop.call_later(self._server.accept_delay_s, self.resume_reading)

    def data_received(self, data: bytes) -> None:
        fault = self._server.claim_connection_fault("accept") if self._exchange is None else None
        if fault is not None:
            return self._fail(fault)
        self._h11.receive_data(data)
        self._advance()

    def _fail(self, fault: Fault) -> None:
        """Act out a fault of the connection itself."""
        if fault.do == "hang":
            return self.pause_reading()
        if fault.do == "garbage":
            self._transport_().write(GARBAGE)
        return self.reset() if fault.do == "rst" else self.close()

    def eof_received(self) -> bool:
        return False  # like Go's server: a client that half-closes has left

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        self._server.notice()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # for the exchange

    def pause_reading(self) -> None:
        """Stop reading from the socket."""
        if self._reading and not self._transport_().is_closing():
            self._reading = False
            self._transport_().pause_reading()

    def resume_reading(self) -> None:
        """Read from the socket again."""
        if not self._reading and not self._transport_().is_closing():
            self._reading = True
            self._transport_().resume_reading()

    def read_on(self) -> None:
        """Read whatever comes, so that the client's leaving is noticed."""
        if self._exchange is not None:
            self._exchange.window_bytes = float("inf")
        self.resume_reading()

    def send_continue(self) -> None:
        """Send ``100 Continue`` if the client waits for it."""
        if self._h11.they_are_waiting_for_100_continue:
            reply = self._h11.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
            self._transport_().write(reply or b"")

    async def write(self, data: bytes) -> None:
        """Write bytes with back-pressure, unless the node is frozen."""
        if not self._server.thawed.is_set():
            await self._server.thawed.wait()
        self._transport_().write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    async def flush(self) -> None:
        """Return when the kernel has everything that was written."""
        transport = self._transport_()
        while transport.get_write_buffer_size() and not transport.is_closing():
            await asyncio.sleep(0.001)

    def reset(self) -> None:
        """Reset the connection: the peer gets an RST."""
        transport = self._transport_()
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.fileno() >= 0:
            with socket.fromfd(raw.fileno(), raw.family, raw.type) as copy:
                copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    def close(self) -> None:
        """Close the connection in order."""
        self._transport_().close()

    def linger(self) -> None:
        """Say that nothing more comes and close a little later, so that no RST overtakes what was sent."""
        transport = self._transport_()
        self.pause_reading()
        if not transport.is_closing():
            transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_S, transport.close)

    def notice(self) -> None:
        """Wake those who wait for a condition."""
        self._server.notice()

    def end(self) -> None:
        """Close the connection, at once if its client does not take what was written."""
        transport = self._transport_()
        if transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()

    def _transport_(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    # requests, one after the other

    def _advance(self) -> None:
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError:
                body = b"400 Bad Request"
                head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
                self._transport_().write(head + b"Connection: close\r\n\r\n" + body)
                return self.close()
            if isinstance(event, h11.Request):
                self._exchange = Exchange(self, event)
                self._task = asyncio.get_running_loop().create_task(self._run(self._exchange))
                self._server.tasks.add(self._task)
                self._task.add_done_callback(self._server.task_done)
            elif isinstance(event, h11.Data):
                assert self._exchange is not None
                self._exchange.feed(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                assert self._exchange is not None
                self._exchange.feed_eof()
            else:  # NEED_DATA, PAUSED, ConnectionClosed
                return

    async def _run(self, exchange: Exchange) -> None:
        record, reuse = exchange.record, False
        try:
            await self._server.serve(exchange)
            reuse = not exchange.close
        except Aborted as aborted:
            reuse = aborted.reuse
        except Exception as problem:  # noqa: BLE001  the outermost boundary: kept for the test to see
            self._server.errors.append(problem)
            self.reset()
        finally:
            if record.outcome == "open":
                record.outcome = "cancelled"
            record.finished_s = clock_s()
            self._server.notice()
        dropped = exchange.discard()
        while reuse and not exchange.body_complete and dropped < DISCARD_BYTES:
            await exchange._more.wait()
            dropped += exchange.discard()
        if not exchange.body_complete:
            return self.linger()
        if not reuse:
            return self.close()
        trailing, _ = self._h11.trailing_data
        self._h11, self._exchange, self._task = h11.Connection(h11.SERVER), None, None
        if trailing:
            self.data_received(trailing)


class HttpServer:
    """A listener on loopback, its connections, and the faults that wait on it."""

    def __init__(self, handler: Callable[[Exchange], Awaitable[None]], keep_records: int = 100_000) -> None:
        self.handler = handler
        self.notice = Notice()
        self.received: deque[Received] = deque(maxlen=keep_records)
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.errors: list[Exception] = []
        self.faults: list[Fault] = []
        self.accept_delay_s: float | None = None
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.host = "127.0.0.1"
        self.port = 0
        self._listener: asyncio.Server | None = None
        self._full: list[socket.socket] = []  # a listener that nobody accepts from, and what fills its queue

    @property
    def listening(self) -> bool:
        """Whether new connections are accepted."""
        return self._listener is not None

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on ``port`` (0: an ephemeral one, kept when listening again)."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self), host, port or self.port, backlog=1024
        )
        self.host, self.port = self._listener.sockets[0].getsockname()[:2]

    async def refuse(self) -> None:
        """Close the listener: new connections are refused, established ones go on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        while self._full:
            self._full.pop().close()

    async def drop_syns(self) -> None:
        """Let the kernel drop what asks for a new connection: the listener's queue is full.

        Established connections go on. The queue of a backlog of 0 holds one connection (Linux).
        """
        await self.refuse()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(0)
        self._full = [listener]
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((self.host, self.port))
            self._full.append(filler)

    async def stop(self, *, reset: bool = False) -> None:
        """Close the listener and every connection (with RST if ``reset``)."""
        await self.refuse()
        for connection in list(self.connections):
            if reset:
                connection.reset()
            else:
                connection.end()
        self.thawed.set()
        await self.notice.until(lambda: not self.connections and not self.tasks)

    def task_done(self, task: asyncio.Task[None]) -> None:
        """Forget a request's task."""
        self.tasks.discard(task)
        self.notice()

    def claim(self, method: str, path: str) -> Fault | None:
        """Take the first waiting fault that matches a request."""
        for fault in self.faults:
            if fault.at not in ("connect", "accept") and fault.matches(method, path):
                fault.hits += 1
                return fault
        return None

    def claim_connection_fault(self, at: Moment) -> Fault | None:
        """Take the first waiting fault that acts on a connection at ``at``."""
        for fault in self.faults:
            if fault.at == at and fault.matches("*", "*"):
                fault.hits += 1
                return fault
        return None

    async def serve(self, exchange: Exchange) -> None:
        """Record a request, act out its fault, let the handler answer."""
        record = exchange.record
        self.received.append(record)
        record.fault = exchange.fault = fault = (
            self.claim(record.method, record.path) if self.faults else None
        )
        self.notice()
        if not self.thawed.is_set():
            await self.thawed.wait()
        if (
            fault is not None
            and fault.at == "before_head"
            and (fault.do == "reply" or fault.do not in SHAPING)
        ):
            await exchange.body()
            if fault.do != "reply":
                await exchange.act(fault)
        await self.handler(exchange)
