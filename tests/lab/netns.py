"""Network namespaces: made, entered and removed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

NAMED = Path("/run/netns")  #: where ip-netns keeps its names
PREFIX = "sollol-lab"
CLONE_NEWNET = os.CLONE_NEWNET
NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  #: bits of capabilities(7)


class LabError(Exception):
    """What this machine cannot do for a lab, in one sentence."""


def missing() -> str | None:
    """Why no lab can be built here; None where one can."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    lacks = [name for name, bit in NEEDED.items() if not effective >> bit & 1]
    return f"a lab of network namespaces needs {' and '.join(lacks)}" if lacks else None


def ip(*arguments: str) -> str:
    """Run iproute2's ``ip``; what it printed."""
    return _run("ip", *arguments)


def tc(namespace: str, *arguments: str) -> str:
    """Run iproute2's ``tc`` in a namespace; what it printed."""
    return _run("tc", "-n", namespace, *arguments)


def _run(*command: str) -> str:
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def owner() -> str:
    """What the names of this process's namespaces begin with."""
    return f"{PREFIX}-{os.getpid()}.{_started(os.getpid())}"


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, as pids come again; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def add(name: str) -> None:
    """Make a namespace with loopback up and without IPv6, whose autoconfiguration would be noise."""
    ip("netns", "add", name)
    with entered(name):
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    ip("-n", name, "link", "set", "lo", "up")


@contextlib.contextmanager
def entered(name: str) -> Iterator[None]:
    """Have the calling thread in a namespace. Sockets that it makes there stay there for good."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        other = os.open(NAMED / name, os.O_RDONLY)
        try:
            os.setns(other, CLONE_NEWNET)
        finally:
            os.close(other)
        try:
            yield
        finally:
            os.setns(own, CLONE_NEWNET)
    finally:
        os.close(own)


def kill(name: str) -> None:
    """Kill what runs in a namespace."""
    for pid in ip("netns", "pids", name).split():
        if int(pid) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def remove(name: str) -> None:
    """Kill what runs in a namespace, and remove it."""
    kill(name)
    ip("netns", "delete", name)


def stale() -> list[str]:
    """Names left by processes that are gone."""
    left = []
    for path in sorted(NAMED.glob(f"{PREFIX}-*")):
        pid, _, started = path.name.removeprefix(f"{PREFIX}-").split("-")[0].partition(".")
        if _started(int(pid)) != started:
            left.append(path.name)
    return left
