"""How many threads may compute here at once: cores, this process's affinity, and the quota of its cgroup.

llama.cpp's threads spin while they wait for each other, so one more than may run costs more than one less.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use at once, whatever each of them is."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpu_quota()
    return max(1, min(allowed, int(share))) if share is not None else allowed


def computing_threads() -> int:
    """Return how many threads compute fastest: one for each physical core that may be used."""
    return max(1, min(usable_cpus(), psutil.cpu_count(logical=False) or usable_cpus()))


def cpu_quota(membership: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> float | None:
    """Return how many CPUs' time this process's cgroups allow it, None if they allow all.

    ``membership`` lists the groups (cgroups(7)): version 2 has one of them, version 1 one for each
    controller. Every group above counts too.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            if (share := _share(place)) is not None:
                found.append(share)
            if place == top:
                break
    return min(found, default=None)


def _share(group: Path) -> float | None:
    """What one group allows, in CPUs."""
    try:
        if (both := group / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such controller here
        return None
