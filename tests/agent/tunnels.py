"""What tests of tunnels share: a fleet's members, and a tunnel server whose rpc-servers echo."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from agent import join, pki
from agent.rpc_server import CannotServe, RpcSample
from agent.tunnel import TunnelServer


class Members:
    """The directories of a fleet's members: ``head`` founded it; others are made when they are asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        join.init_fleet(root / "head", "head")

    def directory(self, name: str, role: pki.Role = "agent") -> Path:
        directory = self._root / name
        if pki.identity(directory) is None:
            key, csr = pki.new_request(name, name.encode().hex().zfill(16)[-16:])
            issued = pki.issue(self._root / "head", csr, role)
            pki.save_identity(directory, pki.authority(self._root / "head"), issued, key)
        return directory

    def client(self, name: str = "head", role: pki.Role = "agent") -> ssl.SSLContext:
        return pki.client_context(self.directory(name, role))

    def server(self, name: str = "agent") -> ssl.SSLContext:
        return pki.server_context(self.directory(name))


class EchoProcess:
    """What an rpc-server is to a tunnel: a port that a client is connected to, and a process that can end."""

    def __init__(self, device: str, coordinator: str) -> None:
        self.id = "0123456789abcdef"
        self.build = "b1"
        self.device = device
        self.coordinator = coordinator
        self.pid = 4194304 + 1  # beyond the largest pid
        self.port = 0
        self.killed = False
        self.clients: list[asyncio.StreamWriter] = []
        self.reads = True
        self.state: RpcSample = RpcSample("running", 0.5, 1000)
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.ensure_future(self._wait())
        self._server: asyncio.Server | None = None

    async def start(self) -> "EchoProcess":
        self._server = await asyncio.start_server(self._echo, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def exit(self, code: int) -> None:
        self.state = RpcSample("exited", 0.5, 0)
        if not self._end.done():
            self._end.set_result(code)

    def sample(self) -> RpcSample:
        return self.state

    def obituary(self) -> str:
        return f"it ended with status {self._end.result()}"

    async def stop(self) -> None:
        self.killed = True
        self.exit(-9)
        if self._server is not None:
            self._server.close()
        for client in self.clients:
            client.transport.abort()

    async def _wait(self) -> int:
        return await self._end

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(writer)
        try:
            while self.reads and (data := await reader.read(65536)):
                writer.write(data)
                await writer.drain()
            if self.reads:
                writer.close()
        except ConnectionError:
            writer.close()


class EchoServers:
    """Starts :class:`EchoProcess`; on any device but ``broken``."""

    def __init__(self) -> None:
        self.started: list[EchoProcess] = []
        self.asked: list[tuple[str, str, int | None, str | None]] = []

    async def start(
        self, device: str, coordinator: str, threads: int | None = None, build: str | None = None
    ) -> Any:
        self.asked.append((device, coordinator, threads, build))
        if device == "broken":
            raise CannotServe("this node has no device broken; it has CPU")
        self.started.append(await EchoProcess(device, coordinator).start())
        return self.started[-1]


@asynccontextmanager
async def tunnel_server(
    members: Members, servers: Any, name: str = "agent", **settings: Any
) -> AsyncIterator[int]:
    """A tunnel server on loopback; gives its port."""
    server = TunnelServer(servers, accept=members.server(name), connect=members.client(name), **settings)
    port = await server.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await server.close()


class Client:
    """Speaks to a tunnel server byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, context: ssl.SSLContext | None) -> "Client":
        hostname = "" if context else None
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=hostname))

    async def ask(self, message: Any) -> Any:
        self.send(message)
        return await self.hear()

    def send(self, message: Any) -> None:
        self.writer.write(orjson.dumps(message) + b"\n")

    async def hear(self) -> Any:
        """The next line as an object; None at the end."""
        line = await self.reader.readline()
        return orjson.loads(line) if line else None

    async def end(self) -> bytes:
        """What comes until the server ends the connection, however it does."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()
