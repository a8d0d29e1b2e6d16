"""The processes of the soak, each ended by its own id: nodes, agents, proxies, clients."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import orjson

from tests.soak.house import SETTINGS, SLOTS, House

SOLLOL = (sys.executable, "-c", "from proxy_addon.cli import main; main()")
ROOT = Path(__file__).parents[2]
START_LIMIT_S = 180.0  #: its imports alone take minutes where many others want the processor
END_LIMIT_S = 60.0
#: Below what kernels give to outgoing connections: the port of a killed node must stay free for it, and a
#: connect to a free port of that range may even meet itself.
PORTS = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """Ports that were free just now."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with closing(socket.socket()) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


class Program:
    """A process with its log."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.process: Process | None = None

    @property
    def log(self) -> Path:
        """What it said on stderr, over all its lives."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """The running process."""
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.returncode is None

    async def launch(self, *command: str) -> Process:
        """Start ``command``; its output is a pipe."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                env={**os.environ, "XDG_STATE_HOME": str(self.folder / f"state-{self.name}")},
            )
        return self.process

    async def first_line(self) -> bytes:
        """What it prints first, which says that it works."""
        assert self.process is not None and self.process.stdout is not None
        async with asyncio.timeout(START_LIMIT_S):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} did not start; see {self.log}")
        return line

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self.running:
            os.kill(self.pid, number)

    async def ended(self) -> int:
        """Its exit status, once it has ended."""
        assert self.process is not None
        async with asyncio.timeout(END_LIMIT_S):
            return await self.process.wait()

    async def kill(self) -> None:
        """As ``kill -9``, also of one that is stopped."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            await self.ended()


class Node(Program):
    """A fake node on a port of its own, with a fake agent in it or a real one beside it."""

    def __init__(self, index: int, house: House, port: int, agent_port: int, folder: Path) -> None:
        super().__init__(f"node-{index}", folder)
        self.house = house
        self.port = port
        self.agent_port = agent_port if house.agent != "none" else 0
        self.agent = Program(f"agent-{index}", folder)
        self.host_port = f"127.0.0.1:{port}"
        self.url = f"http://{self.host_port}"

    def setting(self) -> dict[str, object]:
        """Its row in ``sollol.yaml``."""
        agent = {"agent": f"http://127.0.0.1:{self.agent_port}"} if self.agent_port else {}
        return {"host": "127.0.0.1", "port": self.port, "parallel": SLOTS, **agent}

    async def start(self) -> None:
        """Return once it listens."""
        port = ("--port", str(self.port))
        agent = ("--agent-port", str(self.agent_port)) if self.house.agent == "fake" else ()
        await self.launch(sys.executable, "-m", "tests.soak.node", *port, *agent, *self.house.arguments())
        await self.first_line()

    async def start_agent(self) -> None:
        """The real one, where it has one; it outlives the node."""
        if self.house.agent == "real":
            listen = ("--listen", f"127.0.0.1:{self.agent_port}", "--no-mdns", "--ollama", self.url)
            await self.agent.launch(*SOLLOL, "agent", *listen)


class Proxy(Program):
    """``sollol proxy`` on one port, in as many lives as the storm asks for."""

    def __init__(self, port: int, nodes: Sequence[Node], folder: Path, extra: Sequence[str] = ()) -> None:
        super().__init__("proxy", folder)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.config = folder / "sollol.yaml"
        self._nodes = nodes
        self._extra = extra
        self._retired: list[Process] = []

    def configure(self, without: Node | None = None, rounds: int = 5) -> None:
        """Write ``sollol.yaml``: JSON is YAML."""
        listed = [node.setting() for node in self._nodes if node is not without]
        self.write(orjson.dumps({**SETTINGS, "retry": {"rounds": rounds}, "nodes": listed}))

    def write(self, text: bytes) -> None:
        """Replace ``sollol.yaml`` at once as a whole."""
        draft = self.config.with_suffix(".new")
        draft.write_bytes(text)
        draft.replace(self.config)

    async def start(self) -> None:
        """Start a process; whether it is ready is for the caller to ask."""
        state = ("--state-dir", str(self.folder / "state"))
        listen = ("--listen", f"127.0.0.1:{self.port}", "--config", str(self.config))
        process = await self.launch(*SOLLOL, "proxy", *listen, *state, *self._extra)
        assert process.stdin is not None
        process.stdin.close()

    def retire(self) -> Process:
        """The running process, which :meth:`start` may now put another one beside."""
        assert self.process is not None
        self._retired.append(self.process)
        return self.process

    async def kill(self) -> None:
        """Also what was retired and has not left."""
        for old in self._retired:
            if old.returncode is None:
                old.kill()
                await old.wait()
        await super().kill()


class Clients(Program):
    """The process of the clients, told by lines."""

    def __init__(self, url: str, count: int, seed: str, folder: Path) -> None:
        super().__init__("clients", folder)
        self.outcomes = folder / "outcomes.jsonl"
        numbers = ("--clients", str(count), "--seed", seed, "--out", str(self.outcomes))
        self._command = (sys.executable, "-m", "tests.soak.clients", url, *numbers)

    async def start(self) -> None:
        """Start it; it does nothing until :meth:`go`."""
        await self.launch(*self._command)

    def go(self) -> None:
        """Let all begin to ask."""
        self._tell(b"go\n")

    async def rest(self, limit_s: float) -> None:
        """Let each end its request and close its connections; raises TimeoutError."""
        self._tell(b"rest\n")
        assert self.process is not None and self.process.stdout is not None
        async with asyncio.timeout(limit_s):
            line = await self.process.stdout.readline()
        if line != b"resting\n":
            raise RuntimeError(f"the clients failed; see {self.log}")

    def _tell(self, line: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(line)
