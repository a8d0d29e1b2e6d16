"""What the processes that Ollama has started for its models tell: how many requests each serves at a time.

Ollama does not report OLLAMA_NUM_PARALLEL, but gives it to every runner (``-np N``; ``llm/llama_server.go``
of v0.33), and the command line of a process may be read by everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import psutil

FLAGS = ("-np", "--parallel")
SERVER = "ollama"  #: the program whose children are runners; other llama-servers are nobody's business here


def num_parallel() -> int | None:
    """The largest number of slots among the runners of this machine's Ollama; None where none is seen.

    Looks at every process: some milliseconds, to be done when the resident models have changed.
    """
    return most_slots(_runners())


_NUMBER = re.compile(r"0*[1-9][0-9]{0,8}")


def most_slots(command_lines: Iterable[Sequence[str]]) -> int | None:
    """The largest number of slots that ``command_lines`` ask for."""
    found = [slots for line in command_lines if (slots := _slots(line)) is not None]
    return max(found, default=None)


def _slots(line: Sequence[str]) -> int | None:
    for index, word in enumerate(line):
        name, separator, value = word.partition("=")
        if name in FLAGS:
            number = value if separator else next(iter(line[index + 1 : index + 2]), "")
            return int(number) if _NUMBER.fullmatch(number) else None
    return None


def _runners() -> Iterable[Sequence[str]]:
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if not any(flag in line for flag in FLAGS):
                continue
            parent = process.parent()
            if parent is not None and _is_ollama(parent.cmdline()):
                yield line
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it has ended, or is not for us to see


def _is_ollama(line: Sequence[str]) -> bool:
    """Whether ``line`` runs the program, be it through an interpreter."""
    return any(PurePath(word).name in (SERVER, f"{SERVER}.exe") for word in line[:2])
