"""A real embedded node: ``python -m shard serve`` in a process of its own, with a real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ollama
import psutil
import pytest

from shard.models import DEMO_MODEL, demo_model_path

BOUND_S = 60.0


def wait_until[T](condition: Callable[[], T], what: str) -> T:
    """Return the first true value of ``condition``; fail after a bound that only a hang reaches."""
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"not within {BOUND_S:g} s: {what}")


@dataclass
class ShardNode:
    """A running node and the handles that tests need on it."""

    process: subprocess.Popen[str]
    url: str
    model: str = DEMO_MODEL
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=BOUND_S, trust_env=False)

    @property
    def client(self) -> ollama.Client:
        return ollama.Client(self.url, timeout=BOUND_S, trust_env=False)

    def llama_servers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def direct(self) -> httpx.Client:
        """A client of the plain llama-server behind the node."""
        [child] = self.llama_servers()
        flags = child.cmdline()
        transport = httpx.HTTPTransport(uds=flags[flags.index("--host") + 1])
        return httpx.Client(base_url="http://llama-server", transport=transport, timeout=BOUND_S)

    def generating(self) -> bool:
        with self.direct() as direct:
            return any(slot["is_processing"] for slot in direct.get("/slots").json())

    def load(self) -> None:
        assert self.client.generate(self.model, keep_alive="5m").done_reason == "load"

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(BOUND_S)


StartNode = Callable[..., ShardNode]


@pytest.fixture(scope="session")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = demo_model_path(tmp_path_factory.mktemp("hashes"))
    assert path is not None, "the dev environment has the model's package"
    return path


@pytest.fixture(scope="session")
def start_node(tmp_path_factory: pytest.TempPathFactory, gguf_path: Path) -> Iterator[StartNode]:
    state_dir = tmp_path_factory.mktemp("state")
    nodes: list[ShardNode] = []

    def start(*flags: str, env: dict[str, str] | None = None) -> ShardNode:
        command = [sys.executable, "-m", "shard", "serve", "--listen", "127.0.0.1:0", "--threads", "1"]
        process = subprocess.Popen(
            [*command, "--model", f"{DEMO_MODEL}={gguf_path}", "--state-dir", str(state_dir), *flags],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, f"the node did not start: {line!r}"
        node = ShardNode(process, line.split()[-1])
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        node.stop()


@pytest.fixture(scope="module")
def node(start_node: StartNode) -> Iterator[ShardNode]:
    started = start_node()
    started.load()
    yield started
    started.stop()


def options(**given: Any) -> dict[str, Any]:
    """Deterministic and short, unless told otherwise."""
    return {"temperature": 0, "num_predict": 12, "repeat_penalty": 1.0} | given
