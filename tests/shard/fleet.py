"""A real fleet on lab hosts: agents that joined, a coordinator, and whoever asks it from its own host."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from shard.models import DEMO_MODEL
from tests.lab import Host, Lab
from tests.shard.conftest import BOUND_S, wait_until

#: Each machine's state in the test's directory, where its logs lie as well.
LOG = "log"
AGENT_PORT, SHARD_PORT = 11435, 11436
#: No proxy of the environment, and no TLS context made for every question: that costs 50 ms of CPU.
PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}
_TOKEN = re.compile(r"\b(sollol-\S+)")


class Machine:
    """A lab host with a state directory of its own."""

    def __init__(self, host: Host, state: Path) -> None:
        self.host = host
        self.state = state
        self.agent: subprocess.Popen[bytes] | None = None
        state.mkdir()

    @property
    def name(self) -> str:
        """What plans call it."""
        return self.host.address

    def sollol(self, part: str, *arguments: str) -> str:
        """Run a command here; what it printed."""
        ran = self.host.run(
            [sys.executable, "-m", part, *arguments], capture_output=True, text=True, env=self.environment(),
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return str(ran.stdout)

    def start(self, part: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a service here; it writes into a log."""
        with (self.state / f"{part}.{LOG}").open("ab") as log:
            return self.host.popen(
                [sys.executable, "-m", part, *arguments], stdout=log, stderr=log, env=self.environment()
            )

    def environment(self) -> dict[str, str]:
        own = {"XDG_STATE_HOME": str(self.state)}
        return {name: value for name, value in os.environ.items() if not name.startswith("SOLLOL_")} | own

    def said(self, part: str) -> str:
        return (self.state / f"{part}.{LOG}").read_text(errors="replace")

    def rpc_servers(self) -> list[psutil.Process]:
        """The rpc-servers that its agent runs now."""
        assert self.agent is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.agent.pid).children()
            return [child for child in children if "rpc-server" in " ".join(child.cmdline())]
        return []


class ShardFleet:
    """``workers`` lend ``lends`` each; the coordinator itself has ``memory`` for layers."""

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        gguf: Path,
        workers: Sequence[str],
        *,
        lends: str | Mapping[str, str] = "4GiB",
        memory: str = "0B",
        parallel: int = 1,
    ) -> None:
        self.lab = lab
        self.gguf = gguf
        self.coordinator = Machine(lab["coordinator"], directory / "coordinator")
        self.workers = {name: Machine(lab[name], directory / name) for name in workers}
        self.lends = {name: lends if isinstance(lends, str) else lends[name] for name in workers}
        self._memory = memory
        self._parallel = parallel
        self.more_models: dict[str, Path] = {}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.coordinator.host.address}:{SHARD_PORT}"

    def start(self) -> None:
        """Found the fleet, let everybody join it, and wait until all are seen."""
        state = str(self.coordinator.state)
        self.coordinator.sollol("shard", "init", "--state-dir", state)
        self.serve()
        for name, worker in self.workers.items():
            said = self.coordinator.sollol("shard", "init", "--state-dir", state)
            token = _TOKEN.search(said)
            assert token is not None, said
            worker.sollol("agent", "join", self.url, token[1], "--state-dir", str(worker.state))
            self.start_agent(name)
        for name in self.workers:
            self.wait_for_agent(name)

    def start_agent(self, name: str) -> None:
        worker = self.workers[name]
        worker.agent = worker.start(
            "agent", "--listen", f"{worker.host.address}:{AGENT_PORT}", "--state-dir", str(worker.state),
            "--memory", self.lends[name], "--no-mdns",
        )  # fmt: skip

    def wait_for_agent(self, name: str) -> None:
        """Wait until this agent's tunnel is open and its llama.cpp found."""

        def lends() -> bool:
            rpc = (self.agent_report(name) or {}).get("rpc") or {}
            return bool(rpc.get("tunnel_port") and rpc.get("build"))

        wait_until(lends, f"the agent of {name} lends its machine")

    def agent_report(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(self.http_get(f"http://{self.workers[name].host.address}:{AGENT_PORT}/v1/report"))
        except httpx.HTTPError:
            return None

    def serve(self, *more: str) -> None:
        """Start the coordinator's service."""
        agents = ",".join(worker.host.address for worker in self.workers.values())
        self.process = self.coordinator.start(
            "shard", "serve", "--listen", f"{self.coordinator.host.address}:{SHARD_PORT}",
            "--state-dir", str(self.coordinator.state), "--agents", agents, "--memory", self._memory,
            "--model", f"{DEMO_MODEL}={self.gguf}", "--threads", "1", "--parallel", str(self._parallel),
            "--no-mdns", "--verbose", *more,
            *(part for name, path in self.more_models.items() for part in ("--model", f"{name}={path}")),
        )  # fmt: skip
        wait_until(self.answers, "the coordinator answers")

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.coordinator.said("shard")
        with contextlib.suppress(httpx.HTTPError):
            return bool(self.http_get(f"{self.url}/api/version"))
        return False

    # Asking

    def http_get(self, url: str) -> Any:
        with self.coordinator.host.entered():
            return httpx.get(url, timeout=BOUND_S, **PLAIN).raise_for_status().json()

    def ask(self, path: str, **body: Any) -> httpx.Response:
        """A whole answer."""
        with self.coordinator.host.entered():
            return httpx.post(
                self.url + path, json={"model": DEMO_MODEL} | body, timeout=2 * BOUND_S, **PLAIN
            )

    @contextlib.contextmanager
    def stream(self, path: str, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The objects of a streamed answer, as they come."""
        with self.coordinator.host.entered():
            client = httpx.Client(timeout=2 * BOUND_S, **PLAIN)
            request = client.build_request("POST", self.url + path, json={"model": DEMO_MODEL} | body)
            response = client.send(request, stream=True)
        try:
            assert response.status_code == 200, response.read()
            yield (json.loads(line) for line in response.iter_lines())
        finally:
            response.close()
            client.close()

    def generate(self, prompt: str, **options: Any) -> dict[str, Any]:
        """A whole answer of ``/api/generate``, with temperature 0."""
        given = {"temperature": 0, "num_predict": 16, "repeat_penalty": 1.0} | options
        answer = self.ask("/api/generate", prompt=prompt, raw=True, stream=False, options=given)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    # Seeing

    def report(self) -> dict[str, Any]:
        return dict(self.http_get(f"{self.url}/v1/report"))

    def loads(self) -> list[dict[str, Any]]:
        return list(self.report()["shard"]["loads"])

    def plans(self) -> list[dict[str, Any]]:
        return list(self.report()["shard"]["plans"])

    def nodes_of(self, plan: Mapping[str, Any]) -> set[str]:
        """The workers that hold layers by ``plan``."""
        by_name = {worker.name: name for name, worker in self.workers.items()}
        return {by_name[share["node"]] for share in plan["shares"] if share["node"] in by_name}

    def holders(self) -> set[str]:
        """The workers by the plan that is loaded now."""
        ready = [load for load in self.loads() if load["phase"] == "ready"]
        return self.nodes_of(ready[0]["plan"]) if ready else set()

    def llama_servers(self) -> list[psutil.Process]:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "llama-server" in child.name()]
