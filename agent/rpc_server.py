"""Supervises ``ggml-rpc-server`` processes: each lends one device of this node to one coordinator's model.

An rpc-server serves a single client, knows no authentication and never lets a second caller know that it is
busy. So each model gets a process of its own, it listens on loopback only, and nobody ever connects to it to
see how it does: whether it lives is asked of the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from agent import llama_cpp
from agent.child import dies_with_us
from agent.cpus import computing_threads
from agent.llama_cpp import GgmlDevice, Program
from agent.report import Gpu, Host, Rpc, RpcDevice, RpcServer
from agent.worker import Worker

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
# llama.cpp's own default, and enough behind it for every coordinator of a large fleet.
PORTS = range(50052, 50052 + 1000)
# To load CUDA and its kernels takes seconds on a machine that has just started.
START_TIMEOUT_S = 60.0
# Between two looks at whether a starting process listens; the kernel tells this to nobody unasked.
LISTEN_INTERVAL_S = 0.01
_TAIL_LINES = 20

CPU = "CPU"

# GPU vendor → the backends of ggml that compute on it, as their devices are called without the number.
_BACKENDS: dict[str, tuple[str, ...]] = {
    "nvidia": ("CUDA", "Vulkan"),
    "amd": ("ROCm", "Vulkan"),
    "apple": ("MTL", "Metal"),
}
# Drivers keep a little of a GPU's memory to themselves, and the two that tell its size not the same little.
_SAME_SIZE = 0.05

State = Literal["running", "stopped", "exited"]

_STATES: dict[str, State] = {
    psutil.STATUS_STOPPED: "stopped",
    psutil.STATUS_TRACING_STOP: "stopped",
    psutil.STATUS_ZOMBIE: "exited",
    psutil.STATUS_DEAD: "exited",
}


class CannotServe(Exception):
    """This node cannot lend what was asked for; the text is one sentence that says why."""


@dataclass(frozen=True, slots=True)
class RpcSample:
    """How an rpc-server is doing."""

    state: State
    cpu_s: float
    memory_bytes: int


def match(offered: Sequence[GgmlDevice], gpus: Sequence[Gpu]) -> dict[str, Gpu]:
    """Return which of ``gpus`` each of ggml's devices is; those that are none of them are left out.

    By name, else by size, in the order of both lists. A GPU that two backends offer goes to its vendor's own.
    """
    matched: dict[str, Gpu] = {}
    for same in (_same_name, _same_size):
        for device in sorted(offered, key=lambda device: _backend(device) == "Vulkan"):
            taken = {gpu.index for gpu in matched.values()}
            fits = (
                gpu
                for gpu in gpus
                if gpu.index not in taken and _backend(device) in _BACKENDS[gpu.vendor] and same(device, gpu)
            )
            if device.name not in matched and (found := next(fits, None)):
                matched[device.name] = found
    return matched


def devices(
    gpus: Sequence[Gpu],
    host: Host,
    lends_bytes: int | None = None,
    *,
    offered: Sequence[GgmlDevice] = (),
    held_bytes: Mapping[str, int] | None = None,
) -> list[RpcDevice]:
    """Return what this node can compute on: the GPUs that ggml offers, and the CPU.

    The memory figures are the agent's own, because ggml takes all of the machine's memory for free. Of each
    device no more than ``lends_bytes`` is free, less what is ``held_bytes`` on it already.
    """

    def lendable(name: str, free_bytes: int) -> int:
        if lends_bytes is None:
            return free_bytes
        return max(0, min(free_bytes, lends_bytes - (held_bytes or {}).get(name, 0)))

    matched = match(offered, gpus)
    found = [
        RpcDevice(
            name=device.name,
            kind="gpu",
            gpu_index=gpu.index,
            memory_total_bytes=gpu.memory_total_bytes,
            memory_free_bytes=lendable(device.name, gpu.memory_free_bytes),
            memory_bandwidth_bytes_s=gpu.memory_bandwidth_bytes_s,
        )
        for device in offered
        if (gpu := matched.get(device.name))
    ]
    cpu = RpcDevice(
        name=CPU,
        kind="cpu",
        memory_total_bytes=host.ram_total_bytes,
        memory_free_bytes=lendable(CPU, host.ram_available_bytes),
        memory_bandwidth_bytes_s=host.memory_bandwidth_bytes_s,
    )
    return [*found, cpu]


def _backend(device: GgmlDevice) -> str:
    return device.name.rstrip("0123456789")


def _same_name(device: GgmlDevice, gpu: Gpu) -> bool:
    one, other = device.description.casefold(), gpu.name.casefold()
    return one in other or other in one


def _same_size(device: GgmlDevice, gpu: Gpu) -> bool:
    return abs(device.total_bytes - gpu.memory_total_bytes) <= _SAME_SIZE * gpu.memory_total_bytes


class RpcProcess:
    """One running process, made by :meth:`RpcServers.start`, ended by :meth:`stop`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        *,
        device: str,
        coordinator: str,
        port: int,
        build: str,
        gpu_bytes: Callable[[int], int],
        forget: Callable[[RpcProcess], None],
    ) -> None:
        self.id = secrets.token_hex(8)
        self.device = device
        self.coordinator = coordinator
        self.port = port
        self.build = build
        self.pid = process.pid
        self._process = process
        self._kernel: psutil.Process | None = None
        self._gpu_bytes = gpu_bytes
        self._forget = forget
        self._cpu_s = 0.0
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log(), name=f"log of rpc-server {self.pid}")
        self.exited: asyncio.Task[int] = asyncio.create_task(self._wait(), name=f"rpc-server {self.pid}")

    def sample(self) -> RpcSample:
        """Return how it is doing now; costs some 50 µs and never blocks."""
        state: State = "exited"
        held_bytes = 0
        if not self.exited.done():
            with suppress(psutil.NoSuchProcess):
                self._kernel = process = self._kernel or psutil.Process(self.pid)
                with process.oneshot():
                    state = _STATES.get(process.status(), "running")
                    times = process.cpu_times()
                    self._cpu_s = times.user + times.system
                    held_bytes = process.memory_info().rss
        if state == "exited":
            return RpcSample("exited", self._cpu_s, 0)
        return RpcSample(state, self._cpu_s, held_bytes + self._gpu_bytes(self.pid))

    async def stop(self) -> None:
        """Kill it, which frees all that it holds; safe to call twice.

        It is not asked first: there is nothing that it would save, and a stopped process hears nothing.
        """
        self._forget(self)
        if not self.exited.done():
            with suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.wait({self.exited})

    async def listens(self) -> bool:
        """Wait until it accepts its client, True, or has exited, False."""
        while not self.exited.done():
            if _listens(self.pid, self.port):
                return True
            await asyncio.wait({self.exited}, timeout=LISTEN_INTERVAL_S)
        return False

    def obituary(self) -> str:
        """Return how it ended, and the last trouble that it told of."""
        code = self._process.returncode
        ended = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        told = [line.strip() for line in self._tail if "error" in line.lower() or "fail" in line.lower()]
        return f"it ended with {ended}" + (f": {told[-1]}" if told else "")

    async def _read_log(self) -> None:
        assert self._process.stdout is not None
        while chunk := await self._process.stdout.read(65536):
            for line in chunk.decode("utf-8", "replace").splitlines():
                self._tail.append(line)
                logger.debug("ggml-rpc-server[%d] %s", self.pid, line)

    async def _wait(self) -> int:
        code = await self._process.wait()
        await self._reader
        return code


class RpcServers:
    """The rpc-servers of this node. To have one costs nothing until :meth:`look` or :meth:`start`."""

    def __init__(
        self, *, lends_bytes: int | None = None, threads: int | None = None, ports: Sequence[int] = PORTS
    ) -> None:
        self.tunnel_port: int | None = None
        self.lends_bytes = lends_bytes
        self.threads = threads
        self._ports = ports
        self._running: list[RpcProcess] = []
        self._gpus: Sequence[Gpu] = ()
        self._looked: tuple[Program | None, str | None, tuple[GgmlDevice, ...]] | None = None
        self._looked_with: list[str] | None = None
        self._look = Worker(_look, "llama.cpp")

    async def look(self, gpus: Sequence[Gpu] | None = None) -> None:
        """Find the program and what it can compute on: once, and again when the ``gpus`` change."""
        if gpus is not None:
            self._gpus = gpus
        present = [gpu.uuid or gpu.name for gpu in self._gpus]
        if present != self._looked_with:
            self._looked = await self._look.call()
            self._looked_with = present

    def snapshot(self, host: Host, gpus: Sequence[Gpu]) -> Rpc:
        """Return what a report says of this; ``gpus`` are remembered for what is started later."""
        self._gpus = gpus
        servers, held_bytes = [], dict[str, int]()
        for process in self._running:
            sample = process.sample()
            held_bytes[process.device] = held_bytes.get(process.device, 0) + sample.memory_bytes
            servers.append(
                RpcServer(
                    id=process.id,
                    device=process.device,
                    coordinator=process.coordinator,
                    pid=process.pid,
                    port=process.port,
                    state=sample.state,
                    memory_bytes=sample.memory_bytes,
                )
            )
        program, error, offered = self._looked or (None, "llama.cpp is still being looked for", ())
        return Rpc(
            build=program.build if program else None,
            tunnel_port=self.tunnel_port,
            devices=devices(gpus, host, self.lends_bytes, offered=offered, held_bytes=held_bytes)
            if program
            else [],
            servers=servers,
            lends_bytes=self.lends_bytes,
            error=error,
        )

    async def start(
        self, device: str, coordinator: str, threads: int | None = None, build: str | None = None
    ) -> RpcProcess:
        """Return a process that waits for its client on ``device``, a name of :func:`devices`.

        ``build`` is that of the caller's llama-server. Raises CannotServe; cancelling ends the process.
        """
        await self.look()
        program, error, offered = self._looked or (None, None, ())
        if program is None:
            raise CannotServe(error or "there is no ggml-rpc-server")
        if build is not None and build != program.build:
            raise CannotServe(
                f"the ggml-rpc-server here is of llama.cpp build {program.build} and the coordinator's "
                f"llama-server of build {build}, but only equal builds understand each other"
            )
        name, settings = self._place(device, offered)
        options = ["-d", name, "-t", str(threads or self.threads or computing_threads())]
        for port in self._ports:
            if not _is_free(port):
                continue
            process = await self._spawn(
                program, [*options, "-H", HOST, "-p", str(port)], settings, device, coordinator, port
            )
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    if await process.listens():
                        return process
            except TimeoutError:
                await process.stop()
                raise CannotServe(
                    f"ggml-rpc-server did not listen within {START_TIMEOUT_S:g} s on {device}"
                ) from None
            except BaseException:
                await process.stop()
                raise
            await process.stop()
            if _is_free(port):  # it did not end because somebody was faster
                raise CannotServe(f"ggml-rpc-server cannot run on {device}: {process.obituary()}")
        raise CannotServe(f"no port from {self._ports[0]} to {self._ports[-1]} is free for a ggml-rpc-server")

    async def close(self) -> None:
        """End every process."""
        await asyncio.gather(*(process.stop() for process in tuple(self._running)))

    def _place(self, device: str, offered: Sequence[GgmlDevice]) -> tuple[str, dict[str, str]]:
        """Return what the process shall call ``device``, and the environment that makes it so."""
        if device == CPU:
            return CPU, {}
        gpu = match(offered, self._gpus).get(device)
        if gpu is None:
            known = ", ".join([*match(offered, self._gpus), CPU])
            raise CannotServe(f"this node has no device {device}; it has {known}")
        if device.startswith("CUDA") and gpu.uuid:
            # The number may belong to another GPU by now, the UUID never; and a process that sees one GPU
            # takes no memory of the others.
            return "CUDA0", {"CUDA_VISIBLE_DEVICES": gpu.uuid}
        return device, {}

    async def _spawn(
        self,
        program: Program,
        options: Sequence[str],
        settings: Mapping[str, str],
        device: str,
        coordinator: str,
        port: int,
    ) -> RpcProcess:
        try:
            process = await asyncio.create_subprocess_exec(
                *program.command,
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # A backtrace of a process that aborts takes longer than to start a new one.
                env={**program.environment, **settings, "GGML_NO_BACKTRACE": "1"},
                preexec_fn=dies_with_us(),
                # A Ctrl-C at the terminal is for the agent, which ends its children in order.
                start_new_session=True,
            )
        except OSError as error:
            raise CannotServe(f"{program.command[0]} cannot be started: {error.strerror}") from error
        started = RpcProcess(
            process,
            device=device,
            coordinator=coordinator,
            port=port,
            build=program.build,
            gpu_bytes=self._gpu_bytes,
            forget=self._forget,
        )
        self._running.append(started)
        return started

    def _gpu_bytes(self, pid: int) -> int:
        return sum(
            process.memory_used_bytes or 0
            for gpu in self._gpus
            for process in gpu.processes
            if process.pid == pid
        )

    def _forget(self, process: RpcProcess) -> None:
        if process in self._running:
            self._running.remove(process)


def _look() -> tuple[Program | None, str | None, tuple[GgmlDevice, ...]]:
    found = llama_cpp.find("ggml-rpc-server")
    if not found.programs:
        return None, "; ".join(found.unusable) or "no ggml-rpc-server was found: put one on PATH", ()
    return found.programs[0], None, llama_cpp.ggml_devices("ggml-rpc-server")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the rpc-server does
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _listens(pid: int, port: int) -> bool:
    """Return whether this very process listens on ``port``, whoever else may."""
    try:
        connections = psutil.Process(pid).net_connections("tcp4")
    except (psutil.Error, OSError):  # it has just ended, which its waiter will tell
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
        for connection in connections
    )
