"""Slots as seen on the command lines of real processes that stand where Ollama's runners would."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.ollama.runners import most_slots, num_parallel

#: Says that it runs, and ends when its standard input does.
RUNNER = "#!/bin/sh\necho ready\nread _\n"


@pytest.mark.parametrize(
    ("line", "slots"),
    [
        (["llama-server", "-m", "x", "-c", "16384", "-np", "4"], 4),
        (["llama-server", "--parallel", "2", "--port", "1"], 2),
        (["llama-server", "--parallel=8"], 8),
        (["llama-server", "-np"], None),
        (["llama-server", "-np", "many"], None),
        (["llama-server", "-np", "0"], None),
        (["llama-server", "-m", "-npx"], None),
        ([], None),
    ],
)
def test_a_command_line_says_how_many(line: list[str], slots: int | None) -> None:
    assert most_slots([line]) == slots


def test_of_several_runners_the_largest_counts() -> None:
    assert most_slots([["a", "-np", "1"], ["b"], ["c", "-np", "4"]]) == 4


@contextmanager
def running(folder: Path, parent: str, runner: str) -> Iterator[None]:
    """A program called ``parent`` that has started ``runner``."""
    server, child = folder / parent, folder / "llama-server"
    child.write_text(RUNNER)
    server.write_text(f"#!/bin/sh\n{child} {runner}\n:\n")
    for program in (server, child):
        program.chmod(0o755)
    process = subprocess.Popen([server, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def test_the_runner_of_a_running_ollama_is_seen(tmp_path: Path) -> None:
    slots = 1000 + os.getpid() % 1000  # more than any other on this machine has
    with running(tmp_path, "ollama", f"-m x -np {slots}"):
        assert num_parallel() == slots
    assert num_parallel() != slots


def test_somebody_elses_llama_server_is_not(tmp_path: Path) -> None:
    with running(tmp_path, "sollol", "-m x -np 999999"):
        assert num_parallel() != 999999
