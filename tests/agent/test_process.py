"""The agent as a process of its own: how it starts, what it imports, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.cli import app
from tests.agent.nvml_stub import Driver

ROOT = Path(__file__).parents[2]


class Process:
    """A running agent; its log is read until it says where it listens."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "agent", *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self.urls: list[str] = []
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log += line
            if "listens on" in line:
                self.urls = [
                    f"http://{each}" for each in re.findall(r"[\d.]+:\d+", line.partition(" on ")[2])
                ]
                break

    def get(self, path: str, url: int = 0) -> str:
        with urllib.request.urlopen(self.urls[url] + path, timeout=20) as answer:
            return str(answer.read().decode())

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.popen.send_signal(how)
        assert self.popen.stderr is not None
        self.log += self.popen.stderr.read()
        return self.popen.wait(30)


type Run = Callable[..., Process]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    started: list[Process] = []

    def start(*arguments: str, environment: dict[str, str] | None = None) -> Process:
        always = ["--no-mdns", "--state-dir", str(tmp_path / "state"), "--ollama", "http://127.0.0.1:9"]
        started.append(Process([*always, *arguments], environment or {}))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait(30)
        assert process.popen.stderr is not None
        process.popen.stderr.close()


def test_it_serves_and_ends_when_told(run: Run, tmp_path: Path) -> None:
    agent = run(
        "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0", environment={"SOLLOL_AGENT_TOKEN": "s3cret"}
    )
    reports = [json.loads(agent.get("/v1/report", url)) for url in (0, 1)]
    node_id = (tmp_path / "state/node_id").read_text().strip()
    assert [report["node_id"] for report in reports] == [node_id, node_id]
    wrong = {"Authorization": "Bearer wrong"}
    request = urllib.request.Request(agent.urls[0] + "/v1/report", headers=wrong)
    with pytest.raises(urllib.error.HTTPError, match="401") as caught:  # the token of the environment
        urllib.request.urlopen(request, timeout=20)
    caught.value.close()
    assert agent.end() == 0
    assert "Traceback" not in agent.log
    again = run("--listen", "127.0.0.1:0", "--kind", "shard")
    report = json.loads(again.get("/v1/report"))
    assert (report["node_id"], report["kind"]) == (node_id, "shard")
    assert again.end(signal.SIGINT) == 0


def test_it_reads_nvml_and_says_when_the_driver_hangs(run: Run, nvml_library: Path, tmp_path: Path) -> None:
    driver = Driver(tmp_path / "nvml.txt")
    driver.have(4)
    agent = run(
        "--listen",
        "127.0.0.1:0",
        environment={
            "LD_LIBRARY_PATH": str(nvml_library.parent),
            "SOLLOL_NVML_STUB": str(driver.path),
        },
    )
    report = json.loads(agent.get("/v1/report"))
    assert [gpu["uuid"] for gpu in report["gpus"]] == [f"GPU-{number:08d}" for number in range(4)]
    driver.say(gpu2_hang=1)
    deadline_s = time.monotonic() + 30
    while "gpus" not in (stale := json.loads(agent.get("/v1/report"))["stale"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert stale["gpus"].startswith("no answer within 2 s; last read ")
    # It ends although a thread is stuck in the driver.
    assert agent.end() == 0


def test_systemd_hears_ready_watchdog_and_stopping(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        agent = run("--listen", "127.0.0.1:0", environment=environment)
        assert manager.recv(100) == b"READY=1"
        assert agent.get("/healthz") == '{"status": "ok"}'  # ready means that it answers
        assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert agent.end() == 0
        heard = {manager.recv(100)}
        while b"STOPPING=1" not in heard:
            heard.add(manager.recv(100))
        assert heard <= {b"WATCHDOG=1", b"STOPPING=1"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen", "11435"], "an address to listen on looks like 127.0.0.1:11435, not '11435'"),
        (["--listen", "x:70000"], "an address to listen on looks like 127.0.0.1:11435, not 'x:70000'"),
        (["--listen", "{taken}"], "the agent cannot listen on {taken}: Address already in use"),
        (
            ["--ollama", "gpu1:11434"],
            "Ollama's address must look like http://127.0.0.1:11434, not 'gpu1:11434'",
        ),
        (["--memory", "lots"], "a size looks like 20GiB, not 'lots'"),
        (["--memory", "-5GiB"], "a size looks like 20GiB, not '-5GiB'"),
        (["--kind", "ray"], "--kind is ollama or shard, not 'ray'"),
        (["--state-dir", "/dev/null/x"], "Not a directory: '/dev/null/x"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        given = [argument.format(taken=taken) for argument in arguments]
        ran = CliRunner().invoke(app, ["--no-mdns", "--state-dir", str(tmp_path), *given])
    assert ran.exit_code == 1
    assert isinstance(ran.exception, SystemExit)  # and no traceback
    (said,) = ran.output.splitlines()
    assert said.startswith("sollol agent: ")
    assert sentence.format(taken=taken) in said


def test_an_agents_process_imports_neither_mitmproxy_nor_what_it_does_not_use() -> None:
    code = "import sys, agent.cli, agent.run, agent.install, agent.server\n"
    code += "print([name for name in sys.modules if name.split('.')[0] in "
    code += "('mitmproxy', 'proxy_addon', 'shard', 'zeroconf', 'pynvml', 'numpy', 'cryptography')])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
