"""Who is compared in the proxy benchmark, each before one node, and how each is started on a given core.

nginx, HAProxy and Envoy run with the files of the routing benchmark. LiteLLM and ollama-herd want other
versions of packages than SOLLOL: they have environments of their own, from ``scripts/bench_*.lock.txt``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import aiohttp
import bench_routing_subjects as balancers
import psutil
from bench_proxy_client import Request
from bench_routing_subjects import (
    HERE,
    ROOT,
    STOP_LIMIT_S,
    Broken,
    Place,
    envoy,
    filled,
    free_port,
    haproxy,
    nginx,
    program,
)  # fmt: skip

START_LIMIT_S = 120.0  #: LiteLLM reads half a gigabyte of packages
PARALLEL = 2048  #: what the node serves at a time, for those who count
HEARTBEAT_S = 5.0
HAPROXY_BYTES = 16384  #: its default; the larger ones of the routing benchmark cost it four times the time
SAID = "[[chunks:{chunks} per_s:{per_s:g} hold:{hold}]] Why is the sky blue?"


@dataclass(frozen=True)
class Api:
    """What a subject is asked: the same work for the node, at the paths that the subject serves."""

    native: bool

    def small(self) -> Request:
        """A request that the node answers at once."""
        body = json.dumps({"model": "embed", "input": "hello"})
        return Request("/api/embed" if self.native else "/v1/embeddings", body)

    def stream(self, chunks: int, per_s: float, hold: int = 0) -> Request:
        """A chat answered in pieces."""
        said = {"role": "user", "content": SAID.format(chunks=chunks, per_s=per_s, hold=hold)}
        body = {"model": "llama3.2", "messages": [said], "stream": True}
        return Request("/api/chat" if self.native else "/v1/chat/completions", json.dumps(body))


OLLAMA, OPENAI = Api(native=True), Api(native=False)


@dataclass(frozen=True)
class Subject:
    """One that is compared; without a command it is the node itself."""

    name: str
    title: str
    command: Callable[[Place, Path, int], list[str]] | None
    version: Callable[[], str]
    api: Api = OLLAMA
    changes: bool = False  #: whether it writes answers anew, so that bytes are not compared
    beside: Callable[[Place, int], Coroutine[None, None, None]] | None = None


def _balancer(command: balancers.Command) -> Callable[[Place, Path, int], list[str]]:
    """One of the routing benchmark's, before a single node whose clock runs like ours."""
    return lambda node, folder, port: command([node], folder, port, 1.0)


def _sollol(splice: bool, node: Place, folder: Path, port: int) -> list[str]:
    """Everything of it in use but what looks beyond this machine."""
    config = folder / "sollol.yaml"
    own = node.address.rpartition(":")[2]
    config.write_text(
        "discovery: {mdns: false, ollama_host: false, agents: false}\n"
        f"nodes: [{{host: 127.0.0.1, port: {own}, parallel: {node.parallel}}}]\n"
    )
    where = ["--listen", f"127.0.0.1:{port}", "--state-dir", str(folder)]
    return [program("sollol"), "proxy", "--config", str(config), *where, *([] if splice else NO_SPLICE)]


NO_SPLICE = ["--set", "splice=false"]


def _mitmdump(node: Place, folder: Path, port: int) -> list[str]:
    mode = f"reverse:http://{node.address}@127.0.0.1:{port}"
    addon = HERE / "peers" / "streaming.py"
    return [program("mitmdump"), "-q", "-s", str(addon), "--mode", mode, "--set", f"confdir={folder}"]


def own_program(environment: str, name: str) -> Path:
    """A program of an environment of its own. Raises Broken where that is not there."""
    path = ROOT / "build" / environment / "bin" / name
    if not path.exists():
        raise Broken(f"not installed: {path.relative_to(ROOT)} is not there; `make bench-proxy` installs it")
    return path


def _litellm(node: Place, folder: Path, port: int) -> list[str]:
    file = filled("litellm.yaml", folder, node=node.address)
    quiet = ["--telemetry", "False", "--log_config", str(HERE / "peers" / "quiet-log.json")]
    where = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [str(own_program("bench-litellm", "litellm")), "--config", str(file), *where, *quiet]


def _herd(node: Place, folder: Path, port: int) -> list[str]:
    start = [str(own_program("bench-herd", "python")), str(HERE / "peers" / "herd.py")]
    return [*start, "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING"]


async def _heartbeats(node: Place, port: int) -> None:
    """What the agent of ollama-herd tells its router every five seconds, without the agent's own cost.

    A large machine with both models loaded, which serves as many requests at a time as the node does.
    """
    names = ["llama3.2:latest", "embed:latest"]
    ollama = {
        "models_available": names, "num_parallel": node.parallel,
        "models_loaded": [{"name": name, "size_gb": 2.0, "context_length": 4096} for name in names],
    }  # fmt: skip
    body = {
        "node_id": "bench", "arch": "x86_64", "ollama": ollama, "ollama_host": f"http://{node.address}",
        "cpu": {"cores_physical": 16, "utilization_pct": 5.0},
        "memory": {"total_gb": 512.0, "used_gb": 16.0, "available_gb": 496.0},
    }  # fmt: skip
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"http://127.0.0.1:{port}/heartbeat", json=body) as answer:
                    await answer.read()
            await asyncio.sleep(HEARTBEAT_S)


def _said(name: str, option: str) -> str:
    said = subprocess.run([program(name), option], capture_output=True, text=True)
    found = re.search(r"[0-9]+[.][0-9]+[.][0-9]+", said.stdout + said.stderr)
    return found[0] if found else "of no version that it tells"


def _installed(environment: str, package: str) -> str:
    python = own_program(environment, "python")
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


DIRECT, OWN, ENVOY, LITELLM = "direct", "sollol", "envoy", "litellm"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(DIRECT, "direct", None, lambda: ""),
        Subject("nginx", "nginx", _balancer(partial(nginx, "least_conn;")), partial(_said, "nginx", "-v")),
        Subject(
            "haproxy", "HAProxy", _balancer(partial(haproxy, buffer_bytes=HAPROXY_BYTES)),
            partial(_said, "haproxy", "-v"),
        ),
        Subject(ENVOY, "Envoy", _balancer(envoy), partial(_said, "envoy", "--version")),
        Subject(OWN, "`sollol proxy`", partial(_sollol, True), partial(version, "sollol")),
        Subject("sollol-layers", "the same, splice off", partial(_sollol, False), partial(version, "sollol")),
        Subject("mitmdump", "`mitmdump`, least addon", _mitmdump, partial(version, "mitmproxy")),
        Subject(
            LITELLM, "LiteLLM, 1 worker", _litellm, partial(_installed, "bench-litellm", "litellm"),
            OPENAI, changes=True,
        ),
        Subject(
            "herd", "ollama-herd", _herd, partial(_installed, "bench-herd", "ollama-herd"),
            changes=True, beside=_heartbeats,
        ),
    )
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """This process's variables without those that a subject would take for settings, and its own home."""
    foreign = ("SOLLOL_", "OLLAMA_", "FLEET_", "LITELLM_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "HOME": str(folder),
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it fetches one
        "FLEET_DATA_DIR": str(folder),
        "FLEET_NODE_TELEMETRY": "false",
        "FLEET_DISABLE_MODEL_PRELOADER": "true",
    }


@dataclass(frozen=True)
class Cores:
    """Where the proxy runs, and where node and clients do."""

    proxy: int
    others: int

    @classmethod
    def of(cls, free: Iterable[int]) -> Cores:
        """Two of the cores that this process may use; twice the same where there is but one."""
        ordered = sorted(free)
        return cls(proxy=ordered[-1], others=ordered[0])


async def spawn(
    command: list[str], core: int, folder: Path, env: Mapping[str, str], log: Path, listen: bool = False
) -> asyncio.subprocess.Process:
    """A process that stays on a core, as do its threads and children. With ``listen`` its output is read."""
    with log.open("ab") as errors:
        return await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=env, stdin=asyncio.subprocess.PIPE, stderr=errors,
            stdout=asyncio.subprocess.PIPE if listen else errors,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process, at last by force."""
    if process.returncode is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


class Family:
    """A process and its children, whose time and memory count together."""

    def __init__(self, pid: int) -> None:
        self.pid, self._root = pid, psutil.Process(pid)

    def _members(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_s(self) -> float:
        """Processor time so far, of all threads, to the nanosecond (/proc knows hundredths of a second)."""
        return sum(time.clock_gettime(~one.pid << 3 | 2) for one in self._members())  # CPUCLOCK_SCHED

    def rss_mb(self) -> float:
        """Resident memory."""
        return sum(float(one.memory_info().rss) for one in self._members()) / 1e6


@dataclass
class Running:
    """A started subject."""

    subject: Subject
    port: int
    family: Family | None
    idle_share: float = 0.0  #: of a core, asked nothing


@contextlib.asynccontextmanager
async def node(core: int, folder: Path) -> AsyncIterator[Place]:
    """The fake node."""
    command = [sys.executable, str(HERE / "bench_proxy_node.py")]
    process = await spawn(command, core, folder, os.environ, folder / "node.log", listen=True)
    try:
        assert process.stdout
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise Broken(f"the node did not start: {(folder / 'node.log').read_text()[-500:]}")
        yield Place(f"127.0.0.1:{port}", "", PARALLEL)
    finally:
        await stop(process)


@contextlib.asynccontextmanager
async def running(subject: Subject, place: Place, core: int, folder: Path) -> AsyncIterator[Running]:
    """Start a subject and stop it at the end. Raises Broken, with its last words, where it does not start."""
    if subject.command is None:
        yield Running(subject, int(place.address.rpartition(":")[2]), None)
        return
    folder.mkdir()  # noqa: ASYNC240 - one folder, before anything is measured
    port, log = free_port(), folder / "log"
    command = subject.command(place, folder, port)
    process = await spawn(command, core, folder, environment(folder), log)
    beside = asyncio.create_task(subject.beside(place, port)) if subject.beside else None
    try:
        await _until_up(subject, port, process)
        yield Running(subject, port, Family(process.pid))
    except TimeoutError as error:
        raise Broken(f"it was not ready in time: {log.read_text(errors='replace')[-500:]}") from error
    finally:
        if beside is not None:
            beside.cancel()
        await stop(process)


async def _until_up(subject: Subject, port: int, process: asyncio.subprocess.Process) -> None:
    """Wait until it answers what it will be asked. Nobody tells us; we have to look."""
    request, kind = subject.api.small(), {"Content-Type": "application/json"}
    url, body = f"http://127.0.0.1:{port}{request.path}", request.body
    async with asyncio.timeout(START_LIMIT_S), aiohttp.ClientSession() as session:
        while process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(url, data=body, headers=kind) as answer:
                    if answer.status == 200 and await answer.read():
                        return
            await asyncio.sleep(0.2)
    raise TimeoutError
