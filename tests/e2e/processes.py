"""A fleet as a user runs it: every part a process of its own, with a real model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil

SOLLOL = (sys.executable, "-c", "from proxy_addon.cli import main; main()")
BOUND_S = 60.0  #: only a hang takes longer


def until[T](holds: Callable[[], T], what: str) -> T:
    """The first true value of ``holds``, for what a process tells only to those who ask."""
    deadline_s = time.monotonic() + BOUND_S
    while time.monotonic() < deadline_s:
        if value := holds():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"not within {BOUND_S:g} s: {what}")


def free_ports(count: int) -> list[int]:
    """Ports that were free just now, none of them twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(held_socket.getsockname()[1]) for held_socket in sockets]


@dataclass
class Fleet:
    """Nodes with an agent each, and a proxy. ``folder`` takes their state and logs."""

    folder: Path
    gguf: Path
    model: str
    node_ports: Sequence[int]
    url: str = ""
    regular: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str, **env: str) -> None:
        """Start ``sollol ARGUMENTS`` with a state directory of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*SOLLOL, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "XDG_STATE_HOME": str(self.folder / f"state-{name}"), **env},
            )

    def start_node(self, port: int) -> None:
        model = ("--model", f"{self.model}={self.gguf}", "--threads", "1")
        state = ("--state-dir", str(self.folder / "hashes"))  # shared, or each would hash the file
        self.start(f"node-{port}", "shard", "serve", "--listen", f"127.0.0.1:{port}", *model, *state)

    def start_all(self) -> None:
        """Return once the proxy says that every node is up and has reported."""
        proxy_port, regular_port, *agent_ports = free_ports(2 + len(self.node_ports))
        nodes = []
        for port, agent_port in zip(self.node_ports, agent_ports, strict=True):
            self.start_node(port)
            how = ("--listen", f"127.0.0.1:{agent_port}", "--no-mdns", "--kind", "shard")
            self.start(f"agent-{port}", "agent", *how, "--ollama", f"http://127.0.0.1:{port}")
            nodes.append({"host": "127.0.0.1", "port": port, "agent": f"http://127.0.0.1:{agent_port}"})
        config = self.folder / "sollol.yaml"
        config.write_bytes(orjson.dumps({"nodes": nodes}))  # JSON is YAML
        self.url, self.regular = f"http://127.0.0.1:{proxy_port}", f"http://127.0.0.1:{regular_port}"
        self.start(
            "proxy", "proxy", "--config", str(config), "--listen", f"127.0.0.1:{proxy_port}",
            "--mode", f"regular@127.0.0.1:{regular_port}", "--state-dir", str(self.folder / "state"),
            "--set", "discovery.mdns=false", "--set", "discovery.ollama_host=false",
            "--set", "discovery.localhost=false", "--set", "poll.interval_s=0.2",
            HOME="/proc",  # nobody can write there: it must not want to, as a system service has no home
        )  # fmt: skip
        self.wait_up()

    def wait_up(self) -> None:
        def all_up() -> bool:
            try:
                rows = self.get("/sollol/nodes").json()["nodes"]
            except httpx.TransportError:
                return False
            states = [(row["state"], row["cpu_utilisation"] is not None, bool(row["models"])) for row in rows]
            return states == [("up", True, True)] * len(self.node_ports)

        until(all_up, f"the nodes are up; the logs are in {self.folder}")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=BOUND_S, trust_env=False)

    def kill_node(self, port: int) -> None:
        """As ``kill -9``; its llama-server ends with it."""
        process = self.processes.pop(f"node-{port}")
        children = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        assert not psutil.wait_procs(children, BOUND_S)[1], "llama-server outlives its node"

    def stop(self) -> dict[str, int]:
        """End every process politely; their exit statuses."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(BOUND_S) for name, process in self.processes.items()}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def sollol(self, *arguments: str) -> str:
        """What ``sollol ARGUMENTS`` prints about this proxy."""
        done = subprocess.run(
            [*SOLLOL, *arguments], env={**os.environ, "SOLLOL_URL": self.url}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def explain(self, request_id: str) -> dict[str, Any]:
        made: dict[str, Any] = self.get(f"/sollol/explain/{request_id}").json()
        return made
