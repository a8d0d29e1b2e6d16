"""The coordinator's half of a tunnel: a rpc-server on another machine, for as long as it is held.

``agent/tunnel.py`` says what is spoken. A :class:`Lease` is held over a connection of its own, which tells
how the process does; llama-server is given a port on loopback, where each connection gets a tunnel.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

import psutil

from agent import membership
from agent.json_lines import JsonLines, Message, NoMessage
from agent.links import Link, measure_over
from agent.peer_uid import is_foreign
from agent.rpc_server import HOST, START_TIMEOUT_S, RpcSample
from agent.splice import Splice

logger = logging.getLogger(__name__)

CONNECT_S = 3.0
ANSWER_S = 10.0
PING_S = 1.0
SILENT_S = 5.0
# The agent samples once a second. A process may be stopped for a moment, by a debugger or a freezer.
STOPPED_SAMPLES = 3
CLOSE_S = 3.0


class TunnelError(Exception):
    """An agent does not give what was asked of it; the text is one sentence that names the agent."""


class Lease:
    """A rpc-server of one's own on another machine; made by :meth:`open`, given back by :meth:`close`."""

    def __init__(
        self, lines: JsonLines, where: tuple[str, int], context: ssl.SSLContext, answer: Message
    ) -> None:
        self.id = str(answer["id"])
        self.build = str(answer["build"])
        self.agent = membership.peer(lines.transport.get_extra_info("peercert"))
        self.endpoint = ""  #: "127.0.0.1:PORT", for ``llama-server --rpc``
        self.direct = False  #: whether the endpoint is the rpc-server's own, for it runs on this machine
        self.latest: RpcSample | None = None
        self.received_bytes = 0  #: by the rpc-server through its tunnels; stays 0 where :attr:`direct`
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._lines = lines
        self._where = where
        self._context = context
        self._listener: asyncio.Server | None = None
        self._tunnels: set[Splice] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._samples: deque[RpcSample] = deque(maxlen=STOPPED_SAMPLES)

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        context: ssl.SSLContext,
        *,
        device: str,
        build: str,
        threads: int | None = None,
    ) -> Lease:
        """Have the agent at ``host`` start a rpc-server on ``device``; raises TunnelError.

        ``build`` is that of the llama-server that will use it.
        """
        lines = await connect(host, port, context)
        wanted = {"op": "rpc-server", "device": device, "build": build, "threads": threads}
        try:
            answer = await ask(lines, wanted, address(host, port), START_TIMEOUT_S + ANSWER_S)
            lease = cls(lines, (host, port), context, answer)
            await lease._begin(int(answer["port"]), int(answer["local_pid"]))
        except (KeyError, ValueError, TypeError, membership.PkiError) as error:
            lines.transport.abort()
            raise TunnelError(f"{address(host, port)} answers what no agent answers") from error
        except BaseException:
            lines.transport.abort()
            raise
        return lease

    def reset(self) -> None:
        """Let every connection to the rpc-server fail at once, at both of its ends.

        Where the endpoint is the rpc-server's own there is no connection to reset here: it is killed instead.
        """
        for tunnel in tuple(self._tunnels):
            tunnel.reset()
        if self._lines.ended:
            return
        if self.direct:
            self._lines.transport.abort()
        else:
            self._lines.send({"op": "reset"})

    async def close(self) -> None:
        """Give the rpc-server back; return when its agent has ended it, or does not answer. Safe to repeat.

        :attr:`lost` is left as it is.
        """
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for tunnel in tuple(self._tunnels):
            tunnel.reset()
        if not self._lines.ended:
            self._lines.send({"op": "end"})
        with suppress(TimeoutError, NoMessage):
            async with asyncio.timeout(CLOSE_S):
                while await self._lines.receive() is not None:
                    pass  # what the agent still tells of it
        self._lines.transport.abort()

    async def _begin(self, port: int, pid: int) -> None:
        self.direct = _is_near(self._lines.transport) and _listens_here(pid, port)
        if not self.direct:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: _Local(self._accept, self._tunnels.discard), HOST, 0
            )
            port = self._listener.sockets[0].getsockname()[1]
        self.endpoint = f"{HOST}:{port}"
        self._spawn(self._watch())
        self._spawn(self._ping())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ping(self) -> None:
        while not self._lines.ended:
            self._lines.send({"op": "ping"})
            await asyncio.sleep(PING_S)

    async def _watch(self) -> None:
        reason: str | None = None
        while reason is None:
            try:
                reason = self._hear(await self._lines.receive(SILENT_S))
            except TimeoutError:
                reason = f"the agent has said nothing for {SILENT_S:g} s"
            except NoMessage as error:
                reason = f"the agent makes no sense: {error}"
        if not self.lost.done():
            self.lost.set_result(f"{address(*self._where)}: {reason}")

    def _hear(self, message: Message | None) -> str | None:
        """Take in what the agent tells; return why the rpc-server is lost, None while it is not."""
        match message:
            case None:
                return "the connection to the agent is gone"
            case {
                "state": "running" | "stopped" | "exited" as state,
                "cpu_s": float() | int() as cpu_s,
                "memory_bytes": int(memory_bytes),
                "received_bytes": int(received_bytes),
            }:
                self.latest = RpcSample(state, cpu_s, memory_bytes)
                self.received_bytes = received_bytes
                self._samples.append(self.latest)
            case {"error": str(error)}:
                return error
            case _:
                raise NoMessage("it does not tell how its rpc-server does")
        if state == "exited":
            return f"its rpc-server is gone: {message.get('reason', 'it ended')}"
        if is_stuck(self._samples):
            return f"its rpc-server was stopped {len(self._samples)} seconds ago and does not go on"
        return None

    def _accept(self, local: Splice) -> None:
        self._tunnels.add(local)
        self._spawn(self._carry(local))

    async def _carry(self, local: Splice) -> None:
        """Give a connection of llama-server its tunnel."""
        try:
            lines = await connect(*self._where, self._context)
            try:
                await ask(lines, {"op": "tunnel", "id": self.id}, address(*self._where), ANSWER_S)
            except BaseException:
                lines.transport.abort()
                raise
        except TunnelError as error:
            logger.warning("no tunnel to the rpc-server: %s", error)
            local.reset()
            return
        if local.transport.is_closing():
            lines.transport.abort()
            return
        remote = Splice()
        lines.hand_over(remote)
        remote.join(local)
        local.transport.resume_reading()


class _Local(Splice):
    """A connection of llama-server, which is not read before its tunnel stands.

    Other users' connections are reset: a rpc-server obeys whoever reaches it.
    """

    def __init__(self, accept: Any, ended: Any) -> None:
        super().__init__(ended=ended)
        self._accept = accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        if is_foreign(*map(transport.get_extra_info, ("peername", "sockname"))):
            logger.warning("another user of this machine was kept from a rpc-server")
            self.reset()
            return
        self._accept(self)


def is_stuck(samples: Sequence[RpcSample]) -> bool:
    """Whether a process was stopped in so many samples, the latest ones, and did not compute between them."""
    return (
        len(samples) >= STOPPED_SAMPLES
        and all(sample.state == "stopped" for sample in samples)
        and samples[0].cpu_s == samples[-1].cpu_s
    )


async def measure(host: str, port: int, context: ssl.SSLContext) -> Link:
    """Measure the link from here to the agent at ``host``; raises TunnelError."""
    lines = await connect(host, port, context)
    try:
        return await measure_over(lines)
    except (NoMessage, OSError) as error:  # of which TimeoutError is one
        raise TunnelError(
            f"the link to {address(host, port)} cannot be measured: {_reason(error)}"
        ) from error
    finally:
        lines.transport.close()


async def measured_by(host: str, port: int, context: ssl.SSLContext, peer_host: str, peer_port: int) -> Link:
    """Let the agent at ``host`` measure its link to the one at ``peer_host``; raises TunnelError."""
    lines = await connect(host, port, context)
    wanted = {"op": "measure", "host": peer_host, "port": peer_port}
    try:
        answer = await ask(lines, wanted, address(host, port), 2 * ANSWER_S)
        return Link(float(answer["rtt_s"]), float(answer["bytes_s"]))
    except (KeyError, ValueError, TypeError) as error:
        raise TunnelError(f"{address(host, port)} answers what no agent answers") from error
    finally:
        lines.transport.close()


async def connect(host: str, port: int, context: ssl.SSLContext) -> JsonLines:
    """Return a connection to the tunnel server of an agent; raises TunnelError."""
    where = address(host, port)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, lines = await asyncio.get_running_loop().create_connection(
                JsonLines, host, port, ssl=context, server_hostname="", ssl_shutdown_timeout=1.0
            )
    except OSError as error:  # of which TimeoutError and ssl.SSLError are some
        raise TunnelError(_failure(where, error)) from error
    return lines


async def ask(lines: JsonLines, message: Message, where: str, timeout_s: float) -> Message:
    """Send a request and return the answer; raises TunnelError, naming ``where`` it came from."""
    lines.send(message)
    try:
        answer = await lines.receive(timeout_s)
    except TimeoutError as error:
        raise TunnelError(f"{where} has not answered within {timeout_s:g} s") from error
    except NoMessage as error:
        raise TunnelError(f"{where} answers what no agent answers: {error}") from error
    if answer is None:
        # Under TLS 1.3 a client learns only now that its certificate was refused; asyncio's servers do not
        # say so, they hang up.
        raise TunnelError(_failure(where, lines.error or ConnectionResetError()))
    if answer.get("ok") is not True:
        raise TunnelError(f"{where} refuses: {answer.get('error')}")
    return answer


def address(host: str, port: int) -> str:
    """Return ``host:port`` as it is written."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _failure(where: str, error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"{where} is no member of this fleet: {error.verify_message}"
        case ssl.SSLError() if "ALERT" in (error.reason or ""):
            alert = (error.reason or "").rpartition("ALERT_")[2].replace("_", " ").lower()
            return f"{where} does not take this node for a member of its fleet: {alert}"
        case ssl.SSLError():
            return f"{where} does not speak TLS: {_reason(error)}"
        case TimeoutError():
            return f"{where} does not answer within {CONNECT_S:g} s"
        case ConnectionRefusedError():
            return f"{where} refuses connections: no agent that has joined a fleet runs there"
        case ConnectionError():
            return f"{where} has closed the connection, as it does to who is no member of its fleet"
        case _:
            return f"{where} cannot be reached: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_S:g} s"
    return str((isinstance(error, OSError) and error.strerror) or error)


def _is_near(transport: asyncio.Transport) -> bool:
    """Whether a connection does not leave its machine, as far as addresses tell."""
    local, peer = transport.get_extra_info("sockname")[0], transport.get_extra_info("peername")[0]
    return bool(local == peer or ipaddress.ip_address(peer).is_loopback)


def _listens_here(pid: int, port: int) -> bool:
    """Whether the process of this id, in our own process and network namespaces, listens on ``port``.

    The kernel lists our namespace's listening sockets by inode, and ``/proc/<pid>/fd`` shows whose they are:
    behind a forwarded port, or in a container, the pid or the inode is another's.
    """
    try:
        connections = psutil.Process(pid).net_connections("tcp4")
    except (psutil.Error, OSError):
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
        for connection in connections
    )
