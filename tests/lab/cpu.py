"""A share of the CPU for a group of processes, by cgroup v1 or v2."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab.netns import LabError

#: Short against the kernel's default of 100 ms, so that a limited host is slow rather than stuttering.
PERIOD_US = 10_000
SMALLEST_QUOTA_US = 1_000  #: the kernel's own bound
REMOVAL_S = 10.0


@dataclass(frozen=True)
class Hierarchy:
    """Where groups with a CPU limit can be made."""

    version: str
    root: Path

    @property
    def means(self) -> str:
        return f"cgroup {self.version}"


def hierarchy() -> Hierarchy | str:
    """Find it in the mount table; else why there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        root = Path(mount)
        if kind == "cgroup" and "cpu" in options.split(",") and os.access(root, os.W_OK):
            return Hierarchy("v1", root)
        if kind == "cgroup2" and "cpu" in (root / "cgroup.controllers").read_text().split():
            try:
                (root / "cgroup.subtree_control").write_text("+cpu")
            except OSError as error:
                return f"cgroup v2 does not give out the CPU controller: {error.strerror}"
            return Hierarchy("v2", root)
    return "no cgroup hierarchy with a CPU controller is writable"


class CpuGroup:
    """A group; what is put into it stays in it with all its children."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self.version, self.path = hierarchy.version, hierarchy.root / name
        self.path.mkdir()

    @property
    def procs(self) -> Path:
        """The file into which a process writes its pid to join."""
        return self.path / "cgroup.procs"

    def limit(self, share: float | None) -> None:
        """Allow so many cores' time (0.3: a third of one); None lifts the limit."""
        quota_us = None if share is None else max(SMALLEST_QUOTA_US, int(share * PERIOD_US))
        if self.version == "v2":
            quota = "max" if quota_us is None else str(quota_us)
            (self.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            return
        (self.path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (self.path / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us))

    def throttled(self) -> int:
        """In how many periods processes wanted more than they may have."""
        rows = (line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return int(dict(rows).get("nr_throttled", 0))

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.procs.read_text().split()]

    def remove(self) -> None:
        """Kill what is in it, and remove it."""
        remove(self.path)


def remove(path: Path) -> None:
    """Kill what is in the group at ``path``, and remove it."""
    give_up = time.monotonic() + REMOVAL_S
    while path.exists():
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
        except OSError as error:  # busy until the last process is reaped, of which no event tells
            if time.monotonic() > give_up:
                raise LabError(f"{path} cannot be removed: {error.strerror}") from error
            time.sleep(0.01)


def leftovers(name: str) -> None:
    """Remove the group that a dead process left under ``name``."""
    found = hierarchy()
    if isinstance(found, Hierarchy) and (found.root / name).exists():
        remove(found.root / name)
