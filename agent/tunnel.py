"""The tunnel server of an agent: members of its fleet lease rpc-servers here and reach them through it.

A connection is mutual TLS (``agent/membership.py``) and begins with requests, a JSON object a line
(``agent/json_lines.py``), each answered by one line, ``{"ok": true, …}`` or ``{"ok": false, "error": "…"}``:

- ``echo`` and ``{"op": "sink", "bytes": N}`` with N raw bytes behind it, for ``agent/links.py``.
- ``{"op": "measure", "host": …, "port": …}``: this agent measures its link to that one.
- ``{"op": "rpc-server", "device": …, "threads": …, "build": …}``: a rpc-server of the caller's own. From then
  on the connection is its lease: every :data:`TELL_S` the agent sends how the process does, and the caller
  ``ping``; ``reset`` resets the tunnels, ``end`` gives the process back. When the connection ends, or nothing
  is heard for :data:`PING_S`, the process is killed.
- ``{"op": "tunnel", "id": …}``: after the answer the connection carries raw bytes to and from that server.

Whoever is not a member fails in the handshake. A member that is no coordinator may only help to measure.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from agent import membership
from agent.json_lines import JsonLines, Message, NoMessage
from agent.lease import TunnelError, measure
from agent.links import MOST_BYTES
from agent.rpc_server import HOST, CannotServe, RpcProcess
from agent.splice import Splice

logger = logging.getLogger(__name__)

PORT = 11437

# How long a connection may take for its handshake, say nothing, or be in the middle of a line.
REQUEST_S = 10.0
TELL_S = 1.0
PING_S = 10.0
# A coordinator needs one connection for a lease and one or two through it.
MOST_CONNECTIONS = 256
# A handshake takes milliseconds. When there are more at once, the oldest gives way: who only connects,
# however often, keeps no member out.
MOST_HANDSHAKES = 64


class Servers(Protocol):
    """Who starts rpc-servers: :class:`~agent.rpc_server.RpcServers`."""

    async def start(
        self, device: str, coordinator: str, threads: int | None = None, build: str | None = None
    ) -> RpcProcess:
        """Return a running process; raises CannotServe."""
        ...


class _Refused(Exception):
    """A request is refused; the text is one sentence for the one who asks."""


@dataclass(eq=False)
class _Lease:
    """A rpc-server, the member it is leased to, and what goes to it and from it."""

    process: RpcProcess
    member: membership.Identity
    received_bytes: int = 0
    tunnels: set[Splice] = field(default_factory=set)

    def count(self, received_bytes: int) -> None:
        self.received_bytes += received_bytes

    def reset(self) -> None:
        for each in tuple(self.tunnels):
            each.reset()

    def status(self) -> Message:
        sample = self.process.sample()
        told: Message = {
            "state": sample.state,
            "cpu_s": sample.cpu_s,
            "memory_bytes": sample.memory_bytes,
            "received_bytes": self.received_bytes,
        }
        return told | {"reason": self.process.obituary()} if sample.state == "exited" else told


class TunnelServer:
    """Accepts members' connections between :meth:`start` and :meth:`close`."""

    def __init__(
        self,
        servers: Servers,
        *,
        accept: ssl.SSLContext,
        connect: ssl.SSLContext,
        request_s: float = REQUEST_S,
        ping_s: float = PING_S,
        most_connections: int = MOST_CONNECTIONS,
        most_handshakes: int = MOST_HANDSHAKES,
    ) -> None:
        self._servers = servers
        self._accept = accept
        self._connect = connect
        self._request_s = request_s
        self._ping_s = ping_s
        self._most_connections = most_connections
        self._most_handshakes = most_handshakes
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], None] = {}  # of these, those not done; oldest first
        self._members = 0
        self._leases: dict[str, _Lease] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises OSError."""
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Door(self._knocked), host, port
        )
        listening: int = self._listener.sockets[0].getsockname()[1]
        return listening

    async def close(self) -> None:
        """End every lease and connection."""
        if self._listener is not None:
            self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _knocked(self, transport: asyncio.Transport) -> None:
        if len(self._handshakes) >= self._most_handshakes:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        task = asyncio.create_task(self._admit(transport))
        self._connections.add(task)
        self._handshakes[task] = None
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._handshakes.pop(task, None)

    async def _admit(self, bare: asyncio.Transport) -> None:
        """Live the life of one connection."""
        peer, lines = _peer(bare), JsonLines()
        try:
            transport = await asyncio.get_running_loop().start_tls(
                bare,
                lines,
                self._accept,
                server_side=True,
                ssl_handshake_timeout=self._request_s,
                ssl_shutdown_timeout=1.0,
            )
        except OSError as error:
            logger.info("refusing %s: %s", peer, error)
            bare.abort()
            return
        except asyncio.CancelledError:
            bare.abort()
            raise
        if transport is None:
            return  # it was closed in the meantime
        task = asyncio.current_task()
        assert task is not None
        self._handshakes.pop(task, None)
        lines.connection_made(transport)
        self._members += 1
        try:
            member = membership.peer(transport.get_extra_info("peercert"))
            if self._members > self._most_connections:
                raise NoMessage("there are too many connections")
            await self._serve(lines, member)
        except (NoMessage, membership.PkiError) as error:
            logger.info("hanging up on %s: %s", peer, error)
            lines.send({"ok": False, "error": str(error)})
        except TimeoutError:
            logger.info("hanging up on %s: it said nothing for %g s", peer, self._request_s)
        except asyncio.CancelledError:
            transport.abort()
            raise
        finally:
            self._members -= 1
            transport.close()

    async def _serve(self, lines: JsonLines, member: membership.Identity) -> None:
        while (message := await lines.receive(self._request_s)) is not None:
            name = message.get("op")
            operation = _OPERATIONS.get(name) if isinstance(name, str) else None
            if operation is None:
                raise NoMessage("this agent knows no such request")
            if member.role not in operation.roles:
                raise NoMessage(f"only a coordinator may ask for this, and {member.name} is none")
            try:
                if not await operation.serve(self, lines, member, message):
                    return
            except _Refused as refused:
                lines.send({"ok": False, "error": str(refused)})

    # The operations. Each returns whether requests may follow.

    async def _echo(self, lines: JsonLines, member: membership.Identity, message: Message) -> bool:
        lines.send({"ok": True})
        return True

    async def _sink(self, lines: JsonLines, member: membership.Identity, message: Message) -> bool:
        size_bytes = _value(message, "bytes", int)
        if not 0 <= size_bytes <= MOST_BYTES:
            raise NoMessage(f"at most {MOST_BYTES} bytes can be sent to measure")
        async with asyncio.timeout(self._request_s):
            arrived = await lines.discard(size_bytes)
        if arrived:
            lines.send({"ok": True})
        return arrived

    async def _measure(self, lines: JsonLines, member: membership.Identity, message: Message) -> bool:
        host, port = _value(message, "host", str), _value(message, "port", int)
        try:
            found = await measure(host, port, self._connect)
        except TunnelError as error:
            raise _Refused(str(error)) from error
        lines.send({"ok": True, "rtt_s": found.rtt_s, "bytes_s": found.bytes_s})
        return True

    async def _rpc_server(self, lines: JsonLines, member: membership.Identity, message: Message) -> bool:
        device, build = _value(message, "device", str), _value(message, "build", str)
        threads = _value(message, "threads", int) if message.get("threads") is not None else None
        try:
            process = await self._servers.start(device, member.name, threads, build)
        except CannotServe as error:
            raise _Refused(str(error)) from error
        lease = self._leases[process.id] = _Lease(process, member)
        logger.info("leased rpc-server %d on %s to %s", process.pid, device, member.name)
        why = "this agent ends"
        try:
            answer = {"id": process.id, "build": process.build, "port": process.port}
            lines.send({"ok": True, **answer, "local_pid": process.pid})
            why = await self._hold(lines, lease)
        finally:
            del self._leases[process.id]
            lease.reset()
            await process.stop()
            logger.info("the lease of rpc-server %d to %s is over: %s", process.pid, member.name, why)
        return False

    async def _hold(self, lines: JsonLines, lease: _Lease) -> str:
        """Keep a lease until it ends; return why it ended."""
        both: list[asyncio.Task[str]] = [
            asyncio.create_task(_tell(lines, lease)),
            asyncio.create_task(_hear(lines, lease, self._ping_s)),
        ]
        try:
            ended, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return ended.pop().result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _tunnel(self, lines: JsonLines, member: membership.Identity, message: Message) -> bool:
        lease = self._leases.get(_value(message, "id", str))
        if lease is None or lease.member != member:
            raise _Refused("there is no such rpc-server")
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            _, inner = await loop.create_connection(
                lambda: Splice(ended=lambda _: ended.set()), HOST, lease.process.port
            )
        except OSError as error:
            raise _Refused(f"the rpc-server does not answer: {error.strerror}") from error
        outer = Splice(received=lease.count)
        lines.send({"ok": True})
        lines.hand_over(outer)
        outer.join(inner)
        lease.tunnels.add(outer)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            outer.reset()
            raise
        finally:
            lease.tunnels.discard(outer)
        return False


async def _tell(lines: JsonLines, lease: _Lease) -> str:
    while True:
        told = lease.status()
        lines.send(told)
        if told["state"] == "exited":
            return str(told["reason"])
        await asyncio.wait({lease.process.exited}, timeout=TELL_S)


async def _hear(lines: JsonLines, lease: _Lease, ping_s: float) -> str:
    while True:
        try:
            message = await lines.receive(ping_s)
        except TimeoutError:
            return f"nothing was heard for {ping_s:g} s"
        match message:
            case None:
                return "the connection was closed"
            case {"op": "ping"}:
                pass
            case {"op": "reset"}:
                lease.reset()
            case {"op": "end"}:
                return "it was given back"
            case _:
                raise NoMessage("a lease knows ping, reset and end alone")


type _Serve = Callable[[TunnelServer, JsonLines, membership.Identity, Message], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class _Operation:
    serve: _Serve
    roles: tuple[membership.Role, ...] = ("coordinator",)


_OPERATIONS = {
    "echo": _Operation(TunnelServer._echo, membership.ROLES),
    "sink": _Operation(TunnelServer._sink, membership.ROLES),
    "measure": _Operation(TunnelServer._measure),
    "rpc-server": _Operation(TunnelServer._rpc_server),
    "tunnel": _Operation(TunnelServer._tunnel),
}


class _Door(asyncio.Protocol):
    """A connection of which nothing is read before it was decided to let it in."""

    def __init__(self, knocked: Callable[[asyncio.Transport], None]) -> None:
        self._knocked = knocked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        bare = cast(asyncio.Transport, transport)
        bare.pause_reading()
        self._knocked(bare)


def _value[T](message: Message, name: str, kind: type[T]) -> T:
    value: Any = message.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise NoMessage(f"{name} is missing or is no {kind.__name__}")
    return value


def _peer(transport: asyncio.BaseTransport) -> str:
    return str((transport.get_extra_info("peername") or ("somebody",))[0])
