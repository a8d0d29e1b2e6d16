"""What llama.cpp itself says a model will take on each device, before it takes anything.

With ``-fit on`` llama-server first builds the model and its context without allocating them, and prints the
bytes of each device; it is stopped at that line. So the model may be larger than the machine.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import llama_cpp

BOUND_S = 60.0

_ROW = re.compile(
    r"memory_breakdown_print: \|\s+- (?P<device>\w+) .*?"
    r"(?P<model>\d+) \+\s+(?P<context>\d+) \+\s+(?P<compute>\d+)[ )]"
)


@dataclass(frozen=True)
class Projected:
    """One device's row, in MiB rounded down as llama.cpp prints it."""

    model_mib: int
    context_mib: int
    compute_mib: int


class Refused(Exception):
    """llama-server exited without a projection; the text is what it logged as errors."""


@contextlib.contextmanager
def rpc_servers(count: int) -> Iterator[list[str]]:
    """Run ``count`` idle rpc-servers of one thread; nothing is ever loaded into them."""
    program = llama_cpp.program("ggml-rpc-server")
    assert program is not None
    ports = [_free_port() for _ in range(count)]
    processes = [
        subprocess.Popen(
            [*program.command, "-p", str(port), "-t", "1"],
            env=dict(program.environment), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for port in ports
    ]  # fmt: skip
    try:
        for port in ports:
            _wait_for(port)
        yield [f"127.0.0.1:{port}" for port in ports]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def project(
    model: Path, endpoints: Sequence[str], split: Sequence[int], num_ctx: int, num_batch: int, *more: str
) -> dict[str, Projected]:
    """Return what llama-server projects for each device (``RPC0``, …, ``Host``) with this tensor split."""
    program = llama_cpp.program("llama-server")
    assert program is not None
    process = subprocess.Popen(
        [
            *program.command, "--rpc", ",".join(endpoints), "--model", str(model),
            "-dev", ",".join(f"RPC{index}" for index in range(len(endpoints))),
            "-fit", "on", "-ngl", "all", "-ts", ",".join(map(str, split)), "-c", str(num_ctx),
            "-b", str(num_batch), "-ub", str(num_batch), "-cram", "0", "-ctxcp", "0", "--no-warmup",
            "--offline", "--port", str(_free_port()), "-lv", "4", *more,
        ],
        env=dict(program.environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    bound = threading.Timer(BOUND_S, process.kill)
    bound.start()
    rows: dict[str, Projected] = {}
    errors = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if " E " in line:
                errors.append(line)
            if row := _ROW.search(line):
                rows[row["device"]] = Projected(int(row["model"]), int(row["context"]), int(row["compute"]))
                if row["device"] == "Host":
                    return rows
    finally:
        bound.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    raise Refused("".join(errors))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no rpc-server on port {port} within {BOUND_S:g} s")
