"""What ``bench_shard.py`` measures, each on hosts of a lab: llama.cpp by itself, and SOLLOL over a fleet."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from agent import llama_cpp
from tests.lab import Host

MODEL = "gemma3:270m"
NUM_CTX = 2048
LIMIT_S = 180.0  #: for anything that is waited for
SOLLOL = (sys.executable, "-c", "from proxy_addon.cli import main; main()")
LLAMA_PORT, RPC_PORT, SHARD_PORT, PROXY_PORT = 8080, 50052, 11436, 11434


@dataclass(frozen=True)
class Answer:
    """An answer as its client saw it, and what the server counted."""

    tokens: int
    prompt_tokens: int
    first_s: float
    total_s: float

    @property
    def tok_s(self) -> float:
        """With everything: the prompt, the network, the proxy."""
        return self.tokens / self.total_s

    @property
    def decode_tok_s(self) -> float:
        """Between the first token and the last."""
        return (self.tokens - 1) / (self.total_s - self.first_s)

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.first_s


def until[T](what: str, ready: Callable[[], T]) -> T:
    """Wait for the first true value of ``ready``."""
    give_up_s = time.monotonic() + LIMIT_S
    while time.monotonic() < give_up_s:
        if value := ready():
            return value
        time.sleep(0.02)
    raise SystemExit(f"{what} took longer than {LIMIT_S:.0f} s")


def core(number: int) -> int:
    """The one core of a worker, as an rpc-server has a thread for each core that it may use."""
    return number % (os.cpu_count() or 1)


class Subject:
    """Something that answers prompts on a host of a lab."""

    def __init__(self, name: str, host: Host, url: str) -> None:
        self.name, self.host, self.url = name, host, url

    def request(self, prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
        """The path, and the body, of a streamed request."""
        raise NotImplementedError

    def read(self, line: str) -> tuple[bool, tuple[int, int] | None]:
        """Of a line of the answer: whether it brings text; tokens and prompt tokens, if it is the last."""
        raise NotImplementedError

    def ask(self, prompt: str, tokens: int) -> Answer:
        """Generate, greedily and streamed."""
        path, body = self.request(prompt, tokens)
        begun_s = time.perf_counter()
        first_s, counts = None, None
        with self._stream(path, body) as lines:
            for line in lines:
                text, last = self.read(line)
                if text and first_s is None:
                    first_s = time.perf_counter() - begun_s
                counts = last or counts
        total_s = time.perf_counter() - begun_s
        if counts is None or first_s is None:
            raise SystemExit(f"{self.name} did not finish its answer")
        if counts[0] != tokens:
            raise SystemExit(f"{self.name} generated {counts[0]} tokens instead of {tokens}")
        return Answer(*counts, first_s, total_s)

    @contextlib.contextmanager
    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        with self.host.entered():  # where a socket is made, it stays
            client = httpx.Client(base_url=self.url, trust_env=False, timeout=LIMIT_S)
            response = client.send(client.build_request("POST", path, json=body), stream=True)
        try:
            if response.status_code != 200:
                raise SystemExit(f"{self.name}: {response.read().decode()}")
            yield response.iter_lines()
        finally:
            response.close()
            client.close()

    def get(self, path: str) -> Any:
        """The JSON behind a path; None while nobody answers."""
        with self.host.entered():
            try:
                answer = httpx.get(self.url + path, trust_env=False, timeout=LIMIT_S)
            except httpx.TransportError:
                return None
        return answer.json() if answer.status_code == 200 else None


class Llama(Subject):
    """llama-server as it comes, alone or over rpc-servers of its own on ``workers``."""

    def __init__(
        self, name: str, host: Host, logs: Path, gguf: Path, workers: Sequence[Host] = (), *flags: str,
        port: int = LLAMA_PORT,
    ) -> None:  # fmt: skip
        super().__init__(name, host, f"http://127.0.0.1:{port}")
        self._port = port
        rpc = llama_cpp.program("ggml-rpc-server")
        server = llama_cpp.program("llama-server")
        if rpc is None or server is None:
            raise SystemExit("llama-server or ggml-rpc-server is missing: run make install")
        endpoints = []
        for number, worker in enumerate(workers):
            address, rpc_port = worker.address, RPC_PORT - 1000 + port + number
            arguments = ("-H", address, "-p", str(rpc_port), "-t", "1")
            log = logs / f"{name}-rpc{number}.log"
            start(worker, log, (*rpc.command, *arguments), rpc.environment, core(number))
            endpoints.append(f"{address}:{rpc_port}")
            until("an rpc-server", partial(connects, host, (address, rpc_port)))
        over = ("--rpc", ",".join(endpoints)) if endpoints else ()
        arguments = (
            *over, "-m", str(gguf), "-fit", "off", "-c", str(NUM_CTX), "-np", "1", "-cram", "0",
            "-ctxcp", "0", "--no-warmup", "-t", "1", "--port", str(port), *flags,
        )  # fmt: skip
        begun_s = time.perf_counter()
        start(host, logs / f"{name}.log", (*server.command, *arguments), server.environment)
        until(name, lambda: self.get("/health"))
        self.ready_s = time.perf_counter() - begun_s

    def request(self, prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "stream": True,
            "temperature": 0,
            "cache_prompt": False,
        }
        return "/completion", body

    def read(self, line: str) -> tuple[bool, tuple[int, int] | None]:
        if not line.startswith("data: "):
            return False, None
        piece = json.loads(line[6:])
        counts = (piece["tokens_predicted"], piece["tokens_evaluated"]) if piece["stop"] else None
        return bool(piece["content"]), counts


class Sollol(Subject):
    """A coordinator's or a proxy's Ollama API."""

    def request(self, prompt: str, tokens: int) -> tuple[str, dict[str, Any]]:
        options = {"temperature": 0, "num_predict": tokens, "num_ctx": NUM_CTX, "repeat_penalty": 1.0}
        return "/api/generate", {"model": MODEL, "prompt": prompt, "raw": True, "options": options}

    def read(self, line: str) -> tuple[bool, tuple[int, int] | None]:
        piece = json.loads(line)
        if error := piece.get("error"):
            raise SystemExit(f"{self.name}: {error}")
        counts = (piece["eval_count"], piece["prompt_eval_count"]) if piece["done"] else None
        return bool(piece["response"]), counts


@dataclass(frozen=True)
class Lender:
    """A worker of a fleet: its host, what it lends, and a number that keeps ports on one host apart."""

    host: Host
    memory: str
    number: int
    loopback: bool = False

    @property
    def address(self) -> str:
        return "127.0.0.1" if self.loopback else self.host.address

    @property
    def listen(self) -> str:
        return f"{self.address}:{11440 + self.number}"

    @property
    def tunnel(self) -> str:
        return f"{self.address}:{11450 + self.number}"


class Fleet:
    """A coordinator without layers of its own, and agents that have joined its fleet."""

    def __init__(self, name: str, host: Host, logs: Path, gguf: Path, lenders: Sequence[Lender]) -> None:
        self.host, self.logs, self.name = host, logs, name
        address = lenders[0].address if lenders[0].loopback else host.address
        self.subject = Sollol(name, host, f"http://{address}:{SHARD_PORT}")
        self._state = ("--state-dir", str(logs / f"{name}-coordinator"))
        self._sollol(host, "shard", "init", *self._state)
        agents = ",".join(lender.listen for lender in lenders)
        self._start(
            host, "coordinator", "shard", "serve", "--listen", f"{address}:{SHARD_PORT}", "--agents", agents,
            "--memory", "0B", "--model", f"{MODEL}={gguf}", "--threads", "1", "--no-mdns", *self._state,
        )  # fmt: skip
        until("the coordinator", lambda: self.subject.get("/api/version"))
        for lender in lenders:
            self._join(lender)
        for lender in lenders:
            self._wait_for(lender)

    def _wait_for(self, lender: Lender) -> None:
        agent = Sollol("agent", self.host, f"http://{lender.listen}")

        def lends() -> bool:
            rpc = (agent.get("/v1/report") or {}).get("rpc") or {}
            return bool(rpc.get("devices") and rpc.get("tunnel_port"))

        until(f"the agent at {lender.listen}", lends)

    def _join(self, lender: Lender) -> None:
        said = self._sollol(self.host, "shard", "init", *self._state)
        token = next(word for word in said.split() if word.startswith("sollol-"))
        name = f"worker{lender.number}"
        state = ("--state-dir", str(self.logs / f"{self.name}-{name}"))
        self._sollol(lender.host, "agent", "join", self.subject.url, token, "--name", name, *state)
        self._start(
            lender.host, name, "agent", "--listen", lender.listen, "--tunnel", lender.tunnel,
            "--memory", lender.memory, "--no-mdns", *state, core=core(lender.number),
        )  # fmt: skip

    def proxy(self) -> Sollol:
        """Start a proxy whose only node is the coordinator."""
        config = self.logs / f"{self.name}-proxy.yaml"
        port = self.subject.url.rpartition(":")[2]
        host = self.subject.url.removeprefix("http://").rpartition(":")[0]
        node = f'{{host: {host}, port: {port}, agent: "{self.subject.url}"}}'
        config.write_text(f"discovery: {{mdns: false, ollama_host: false}}\nnodes:\n- {node}\n")
        self._start(
            self.host, "proxy", "proxy", "--listen", f"127.0.0.1:{PROXY_PORT}", "--config", str(config),
            "--state-dir", str(self.logs / f"{self.name}-proxy"),
        )  # fmt: skip
        subject = Sollol(f"{self.name}, through the proxy", self.host, f"http://127.0.0.1:{PROXY_PORT}")
        until("the proxy", lambda: (subject.get("/api/tags") or {}).get("models"))
        return subject

    def plan(self) -> dict[str, Any] | None:
        """What is loaded now."""
        report = self.subject.get("/v1/report")
        ready = [load["plan"] for load in report["shard"]["loads"] if load["phase"] == "ready"]
        return ready[0] if ready else None

    def _start(self, host: Host, name: str, *arguments: str, core: int | None = None) -> None:
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("SOLLOL_", "OLLAMA_"))
        }
        start(host, self.logs / f"{self.name}-{name}.log", (*SOLLOL, *arguments), clean, core)

    def _sollol(self, host: Host, *arguments: str) -> str:
        done = host.run([*SOLLOL, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"sollol {' '.join(arguments)}: {done.stderr}")
        return str(done.stdout)


def start(
    host: Host, log: Path, command: Sequence[str], environment: Mapping[str, str], core: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a program on a host, perhaps on one core; it writes into ``log`` and ends with the lab."""
    if core is not None:
        command = ("taskset", "--cpu-list", str(core), *command)
    with log.open("wb") as out:
        return host.popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def connects(host: Host, at: tuple[str, int]) -> bool:
    """Whether somebody listens there."""
    with host.socket() as sock:
        sock.settimeout(LIMIT_S)
        return sock.connect_ex(at) == 0
