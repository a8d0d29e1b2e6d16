"""Who is compared: other balancers, SOLLOL with each policy, and the oracle; each started before given nodes.

The others' configurations are the files in ``scripts/peers``, as their documentation recommends for upstreams
that stream. Their intervals are divided by the speed of the nodes' clock, as everybody's are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

import aiohttp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RETRIED_BYTES = 262144  #: of a request; it is in HAProxy's buffer or it is not tried again
START_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0
#: SOLLOL's defaults, in real seconds for everybody: these limits are for machines that stand still, and this
#: one stands still no shorter where the nodes' clock runs faster.
CONNECT_S, POLL_S = 2, 3
CHECK_S, FAIL_S = 2.0, 10.0  #: HAProxy's default, for Envoy too, which has none; nginx's
OUTLIER_INTERVAL_S, EJECTION_S = 10.0, 30.0  #: Envoy's


@dataclass(frozen=True)
class Place:
    """Where a node and its agent answer, and what a user would write of it."""

    address: str
    agent: str
    parallel: int


#: (nodes, a folder of its own, the port to listen on, speed of the clock) → command line.
Command = Callable[[Sequence[Place], Path, int, float], list[str]]


@dataclass(frozen=True)
class Subject:
    """One that is compared; without a command the driver asks the oracle and goes straight to the node."""

    name: str
    title: str
    command: Command | None
    own: bool = False


class Broken(Exception):
    """A subject that does not start or does not do what it must, in one sentence."""


def program(name: str) -> str:
    """Where a program is. Raises Broken where it is nowhere."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=path)
    if not found:
        raise Broken(f"{name} is not installed; `make bench-routing` installs it")
    return found


def filled(template: str, folder: Path, **values: object) -> Path:
    """A file of ``scripts/peers`` with its marks filled in."""
    path = folder / template
    path.write_text(Template((HERE / "peers" / template).read_text()).substitute(values, folder=folder))
    return path


def nginx(method: str, nodes: Sequence[Place], folder: Path, port: int, speed: float) -> list[str]:
    fail_s = max(1, round(FAIL_S / speed))  # nginx knows whole seconds here
    servers = "\n".join(f"        server {node.address} fail_timeout={fail_s}s;" for node in nodes)
    file = filled("nginx.conf", folder, method=method, servers=servers, port=port, connect_s=CONNECT_S)
    return [program("nginx"), "-p", str(folder), "-c", str(file)]


def haproxy(
    nodes: Sequence[Place], folder: Path, port: int, speed: float, buffer_bytes: int = RETRIED_BYTES
) -> list[str]:
    servers = "\n".join(f"    server node{index} {node.address}" for index, node in enumerate(nodes))
    times = {"connect_s": CONNECT_S, "check_ms": round(CHECK_S / speed * 1e3)}
    file = filled("haproxy.cfg", folder, servers=servers, port=port, buffer_bytes=buffer_bytes, **times)
    return [program("haproxy"), "-f", str(file)]


def envoy(nodes: Sequence[Place], folder: Path, port: int, speed: float) -> list[str]:
    places = [node.address.rsplit(":", 1) for node in nodes]
    hosts = [{"socket_address": {"address": host, "port_value": int(own)}} for host, own in places]
    servers = "\n".join(f"{' ' * 14}- {json.dumps({'endpoint': {'address': host}})}" for host in hosts)
    times = {"check_s": CHECK_S, "outlier_interval_s": OUTLIER_INTERVAL_S, "ejection_s": EJECTION_S}
    scaled = {name: f"{seconds / speed:.3f}" for name, seconds in times.items()}
    file = filled("envoy.yaml", folder, servers=servers, port=port, connect_s=CONNECT_S, **scaled)
    quiet = ["--log-level", "warn", "--disable-hot-restart", "--concurrency", "1"]
    return [program("envoy"), "-c", str(file), *quiet]


def sollol(policy: str, nodes: Sequence[Place], folder: Path, port: int, speed: float) -> list[str]:
    """A state directory of its own: nothing is known but what the agents report."""
    lines = [f"  - {{host: 127.0.0.1, port: {node.address.rpartition(':')[2]}, agent: '{node.agent}',"
             f" parallel: {node.parallel}}}" for node in nodes]  # fmt: skip
    config = folder / "sollol.yaml"
    config.write_text("\n".join(["discovery: {mdns: false, ollama_host: false}", "nodes:", *lines, ""]))
    what = ["proxy", "--config", str(config), "--listen", f"127.0.0.1:{port}", "--state-dir", str(folder)]
    clock = [sys.executable, str(HERE / "bench_routing_clock.py"), str(speed)]
    limits = {"timeouts.connect_s": CONNECT_S * speed, "poll.timeout_s": POLL_S * speed}
    sets = [f"placement={policy}", *(f"{name}={seconds}" for name, seconds in limits.items())]
    return [*clock, *what, *(part for one in sets for part in ("--set", one))]


def sollol_twice(nodes: Sequence[Place], folder: Path, port: int, speed: float) -> list[str]:
    """Two proxies of the default policy behind nginx, by the configuration that users are given."""
    text = (ROOT / "deploy" / "nginx" / "sollol.conf").read_text()
    text = text.replace("listen 11434;", f"listen 127.0.0.1:{port};")
    programs: list[dict[str, object]] = []
    for number in (1, 2):
        own, its = folder / str(number), free_port()
        own.mkdir()
        programs.append({"command": sollol("finish_time", nodes, own, its, speed), "port": its})
        text = text.replace(f"127.0.0.1:1150{number}", f"127.0.0.1:{its}")
    (folder / "sollol.conf").write_text(text)
    file = filled("nginx-sollol.conf", folder)
    programs.append({"command": [program("nginx"), "-p", str(folder), "-c", str(file)], "port": port})
    (folder / "programs.json").write_text(json.dumps(programs))
    return [sys.executable, str(HERE / "bench_routing_together.py"), str(folder / "programs.json")]


POLICIES = ("finish_time", "score", "least_loaded", "round_robin")
ORACLE, BASE, OWN, TWICE = "oracle", "nginx-least-conn", "sollol-finish-time", "sollol-twice"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(ORACLE, "all-knowing", None),
        *(
            Subject(f"sollol-{name.replace('_', '-')}", f"SOLLOL {name}", partial(sollol, name), own=True)
            for name in POLICIES
        ),
        Subject(TWICE, "SOLLOL, two proxies", sollol_twice, own=True),
        Subject(BASE, "nginx least_conn", partial(nginx, "least_conn;")),
        Subject("nginx-round-robin", "nginx round robin", partial(nginx, "")),
        Subject("haproxy", "HAProxy leastconn", haproxy),
        Subject("envoy", "Envoy least request", envoy),
    )
}


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """This process's variables without those that a subject would take for settings."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SOLLOL_", "OLLAMA_"))}
    return mine | {"PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Running:
    """A started subject."""

    url: str
    pid: int


@contextlib.asynccontextmanager
async def running(
    subject: Subject, nodes: Sequence[Place], folder: Path, speed: float
) -> AsyncIterator[Running]:
    """Start a subject before nodes, in an empty folder, and stop it at the end.

    Raises Broken, with its own last words.
    """
    assert subject.command is not None
    port, log = free_port(), folder / "log"
    command = subject.command(nodes, folder, port, speed)
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=environment(),
            stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        await _until_up(url, process, speed)
        yield Running(url, process.pid)
    except TimeoutError as error:
        raise Broken(f"{subject.title} was not ready in time: {log.read_text()[-500:]}") from error
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_LIMIT_S * speed):
                    await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _until_up(url: str, process: asyncio.subprocess.Process, speed: float) -> None:
    """Wait until models are listed: then the nodes are known. Nobody tells us; we have to look."""
    async with asyncio.timeout(START_LIMIT_S * speed), aiohttp.ClientSession() as session:
        while process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError, ValueError):
                async with session.get(f"{url}/api/tags") as answer:
                    if answer.status == 200 and (await answer.json())["models"]:
                        return
            await asyncio.sleep(0.1 * speed)
    raise TimeoutError
