"""How many threads may compute, by what cgroups allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.cpus import computing_threads, cpu_quota, usable_cpus


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".", 1)).write_text(text + "\n")


def quota(tmp_path: Path, membership: str) -> float | None:
    listed = tmp_path / "cgroup"
    listed.write_text(membership)
    return cpu_quota(listed, tmp_path / "fs")


@pytest.mark.parametrize(
    ("maximum", "cpus"), [("max 100000", None), ("150000 100000", 1.5), ("20000 10000", 2.0), ("junk", None)]
)
def test_version_2_says_it_in_one_file(tmp_path: Path, maximum: str, cpus: float | None) -> None:
    group(tmp_path / "fs", "a/b", cpu__max=maximum)
    assert quota(tmp_path, "0::/a/b\n") == cpus


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "fs", "a", cpu__max="50000 100000")
    group(tmp_path / "fs", "a/b", cpu__max="400000 100000")
    assert quota(tmp_path, "0::/a/b\n") == 0.5


def test_version_1_says_it_in_two_files_of_the_controller(tmp_path: Path) -> None:
    group(tmp_path / "fs", "cpu/x", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    group(tmp_path / "fs", "memory/x", cpu__cfs_quota_us="1", cpu__cfs_period_us="100000")
    assert quota(tmp_path, "9:memory:/x\n2:cpu,cpuacct:/x\n0::/\n") == 3.0
    group(tmp_path / "fs", "cpu/x", cpu__cfs_quota_us="-1")
    assert quota(tmp_path, "2:cpu,cpuacct:/x\n") is None


def test_a_machine_without_cgroups_allows_all(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None
    assert quota(tmp_path, "0::/not/mounted\n") is None


def test_what_may_be_used_is_no_more_than_the_affinity() -> None:
    assert 1 <= computing_threads() <= usable_cpus() <= len(os.sched_getaffinity(0))
