"""Runs an agent: puts its parts together, listens, and ends when it is told to."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from pydantic import ByteSize, TypeAdapter, ValidationError

from agent import gpu, state
from agent.announce import announceable, announced
from agent.bandwidth import MemoryBandwidth
from agent.host import HostReader
from agent.notify import keep_watchdog_fed, notify
from agent.ollama.client import OllamaClient
from agent.ollama.storage import find_store
from agent.report import NodeKind
from agent.rpc_server import RpcServers
from agent.sampler import Sampler
from agent.server import make_app

logger = logging.getLogger(__name__)


class CannotStart(Exception):
    """The agent cannot start; the text is one sentence that says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """What an agent is told when it is started."""

    listen: Sequence[tuple[str, int]]
    ollama_url: str
    state_dir: Path | None = None
    kind: NodeKind = "ollama"
    token: str | None = None
    mdns: bool = True
    lends_bytes: int | None = None
    threads: int | None = None  #: of each rpc-server's CPU device
    tunnel: tuple[str, int] | None = None  #: where members of its fleet lease rpc-servers


def parse_listen(text: str) -> tuple[str, int]:
    """Return (host, port) of ``HOST:PORT`` or ``[IPv6]:PORT``; raise ValueError with a sentence otherwise."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"an address to listen on looks like 127.0.0.1:11435, not {text!r}")
    return host, int(port)


def parse_size(text: str) -> int:
    """Return the bytes of ``20GiB`` and the like; raise ValueError with a sentence otherwise."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ValueError(f"a size looks like 20GiB, not {text!r}") from error


async def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; raises CannotStart."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    async with AsyncExitStack() as stack:
        try:
            directory = settings.state_dir or state.state_dir()
            node_id = state.node_id(directory)
            ollama = await stack.enter_async_context(OllamaClient(settings.ollama_url))
        except (OSError, ValueError) as error:
            raise CannotStart(str(error)) from error
        rpc = RpcServers(lends_bytes=settings.lends_bytes, threads=settings.threads)
        stack.push_async_callback(rpc.close)
        sampler = Sampler(
            node_id=node_id,
            ollama=ollama,
            gpus=gpu.detect(),
            host=HostReader(find_store()),
            rpc=rpc,
            memory_bandwidth=MemoryBandwidth(threads=settings.threads).read,
            kind=settings.kind,
        )
        await _open_tunnel(stack, settings, directory, rpc)
        await sampler.first()
        app = make_app(sampler, token=settings.token, listens_on=[host for host, _ in settings.listen])
        addresses = await _listen(stack, app, settings.listen)
        if settings.mdns:
            await _announce(stack, settings.kind, node_id, addresses, ollama.url.port)
        _settle()
        notify("READY=1")
        logger.info(
            "agent of node %s listens on %s", node_id, ", ".join(f"{host}:{port}" for host, port in addresses)
        )
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(sampler.run()), tasks.create_task(keep_watchdog_fed())]
            await stop.wait()
            notify("STOPPING=1")
            for task in work:
                task.cancel()


def _reason(error: OSError) -> str:
    # asyncio puts a sentence of its own around the kernel's; who finds no such host has none of its errno.
    number = error.errno or 0
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def _settle() -> None:
    """Give back what only starting needed, 2 MB, and let no collection walk what stays."""
    gc.collect()
    gc.freeze()
    with suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


async def _listen(
    stack: AsyncExitStack, app: web.Application, wanted: Sequence[tuple[str, int]]
) -> list[tuple[str, int]]:
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    for host, port in wanted:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise CannotStart(f"the agent cannot listen on {host}:{port}: {_reason(error)}") from error
    return [address[:2] for address in runner.addresses]


async def _open_tunnel(stack: AsyncExitStack, settings: Settings, directory: Path, rpc: RpcServers) -> None:
    """Let members of this node's fleet, if it belongs to one, lease rpc-servers."""
    # Imported here, for an agent on its own needs none of it.
    from agent import membership
    from agent.tunnel import PORT, TunnelServer

    host, port = settings.tunnel or (settings.listen[0][0], PORT)
    try:
        if not membership.is_member(directory):
            return
        accept, connect = membership.server_context(directory), membership.client_context(directory)
        server = TunnelServer(rpc, accept=accept, connect=connect)
        rpc.tunnel_port = await server.start(host, port)
    except membership.PkiError as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(f"the agent cannot accept tunnels on {host}:{port}: {_reason(error)}") from error
    stack.push_async_callback(server.close)
    logger.info("a member of its fleet, this node accepts tunnels on %s:%d", host, rpc.tunnel_port)


async def _announce(
    stack: AsyncExitStack,
    kind: NodeKind,
    node_id: str,
    listening: Sequence[tuple[str, int]],
    ollama_port: int | None,
) -> None:
    addresses = announceable([host for host, _ in listening])
    if not addresses:
        return  # it listens on loopback alone: there is nothing that another machine could reach
    try:
        await stack.enter_async_context(
            announced(
                node_id=node_id,
                kind=kind,
                addresses=addresses,
                agent_port=listening[0][1],
                ollama_port=ollama_port,
            )
        )
    except OSError as error:
        logger.warning("this node is not announced on the network: mDNS: %s", error)
