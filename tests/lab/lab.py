"""Hosts on one machine: each a network namespace with an address of its own, joined by a switch.

    with Lab("coordinator", "fast", "slow") as lab:
        lab["slow"].cpu(0.3)
        lab["slow"].link(delay_ms=5, rate_bit_s=100e6)
        server = lab["slow"].popen(["ggml-rpc-server", "-p", "50052"])
        lab["fast"].cut()

Nothing of it lies in the root namespace, so labs never meet and none needs addresses of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import cpu, netns, relay
from tests.lab.netns import LabError, ip, tc

NETWORK = "10.231.0"
BRIDGE = "br0"
UPLINK = "eth0"  #: each host's device
#: Kept by netem between two ends; at 1 Gbit/s and 100 ms some 8,000 frames are under way.
NETEM_FRAMES = 100_000
_serial = itertools.count()


def _burst_bytes(rate_bit_s: float) -> int:
    """What tbf lets through at once: 2 ms' worth, and a few frames at least."""
    return max(5_000, int(rate_bit_s / 8 * 0.002))


def shaping(netem: bool, delay_ms: float, rate_bit_s: float | None) -> list[str] | None:
    """Arguments of ``tc qdisc``, for each end of a link; None where nothing is to be shaped by it.

    Without netem it only limits the rate: the delay is the relay's.
    """
    if netem and (delay_ms or rate_bit_s):
        rate = ["rate", f"{int(rate_bit_s)}bit"] if rate_bit_s else []
        return ["netem", "delay", f"{round(delay_ms * 1000)}us", *rate, "limit", str(NETEM_FRAMES)]
    if rate_bit_s:
        burst_bytes = _burst_bytes(rate_bit_s)
        queue_bytes = burst_bytes + max(256 << 10, int(rate_bit_s / 8 * 0.05))
        return ["tbf", "rate", f"{int(rate_bit_s)}bit", "burst", str(burst_bytes), "limit", str(queue_bytes)]
    return None


class Host:
    """One machine of a lab. What is started through it runs in its namespace and in its CPU group."""

    def __init__(self, lab: Lab, name: str, number: int) -> None:
        self.lab, self.name, self.number = lab, name, number
        self.address = f"{NETWORK}.{number}"
        self.hardware_address = f"02:00:0a:e7:00:{number:02x}"
        self.namespace = f"{lab.prefix}-{name}"
        self.delay_means = "none"
        self.cut_off = False
        self._port = f"port{number}"
        self._relay: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[Any]] = []
        self._group = None if isinstance(lab.cpu_by, str) else cpu.CpuGroup(lab.cpu_by, self.namespace)

    @property
    def cpu_means(self) -> str:
        """By what :meth:`cpu` limits, or why it cannot."""
        return self.lab.cpu_by if isinstance(self.lab.cpu_by, str) else self.lab.cpu_by.means

    # Running things

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The same command as run on this host, for whatever starts processes; the pid is the program's."""
        join = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self._group.procs)] if self._group else []
        # In this order: ip-netns mounts a /sys of the namespace, in which there are no cgroups.
        return [*join, "ip", "netns", "exec", self.namespace, *map(str, argv)]

    def popen(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program here (options: those of ``Popen``); it ends with the lab at the latest."""
        child = subprocess.Popen(self.command(argv), **options)
        self._children.append(child)
        return child

    def run(self, argv: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program here to its end (options: those of ``subprocess.run``)."""
        return subprocess.run(self.command(argv), **{"check": True, **options})

    def socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0
    ) -> socket.socket:
        """A socket of this host in the calling process: a test's own client, or server.

        For aiohttp: ``TCPConnector(socket_factory=lambda info: host.socket(*info[:3]))``.
        """
        with netns.entered(self.namespace):
            return socket.socket(family, kind, proto)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Have the calling thread on this host; nothing may be awaited meanwhile."""
        return netns.entered(self.namespace)

    def kill(self) -> None:
        """Kill everything that runs here. After :meth:`cut` it is as if the power went."""
        for child in self._children:  # one that was started just now may not be in its namespace yet
            child.kill()
        netns.kill(self.namespace)

    # Its CPU

    def cpu(self, share: float | None) -> None:
        """Allow everything started here, so far or later, so many cores' time; None lifts the limit."""
        if self._group is None:
            raise LabError(f"{self.name} cannot be limited: {self.cpu_means}")
        self._group.limit(share)

    def throttled(self) -> int:
        """In how many periods the limit of :meth:`cpu` held processes back."""
        return self._group.throttled() if self._group else 0

    # Its link

    def link(self, delay_ms: float = 0, rate_bit_s: float | None = None) -> None:
        """Delay each frame to and from this host, and limit the rate of both directions.

        A round trip to a host without delay takes twice ``delay_ms``. What is under way is lost if the cable
        has to be changed for it; connections survive.
        """
        relayed = bool(delay_ms) and not self.lab.netem
        if relayed or self._relay or not self._connected():
            self._disconnect()
            self._connect(delay_ms / 1000 if relayed else None)
        self.delay_means = ("userspace relay" if relayed else "netem") if delay_ms else "none"
        qdisc = shaping(self.lab.netem, delay_ms, rate_bit_s)
        for namespace, device in ((self.namespace, UPLINK), (self.lab.switch, self._port)):
            if "root" in (shown := tc(namespace, "qdisc", "show", "dev", device)) and "noqueue" not in shown:
                with contextlib.suppress(LabError):  # the kernel's default cannot be deleted
                    tc(namespace, "qdisc", "del", "dev", device, "root")
            if qdisc:
                tc(namespace, "qdisc", "add", "dev", device, "root", *qdisc)

    def cut(self) -> None:
        """Drop its frames at the switch, both ways. Nobody is told: no RST, no ICMP, and its device stays up.

        The switch's port leaves the bridge, behind which nothing has an address.
        """
        self.cut_off = True
        ip("-n", self.lab.switch, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """End :meth:`cut`."""
        self.cut_off = False
        ip("-n", self.lab.switch, "link", "set", self._port, "master", BRIDGE)

    def received_bytes(self) -> int:
        """What has come over the uplink since it was made or changed."""
        return self._counter("rx_bytes")

    def sent_bytes(self) -> int:
        """What has left over the uplink since it was made or changed."""
        return self._counter("tx_bytes")

    def _counter(self, name: str) -> int:
        path = f"/sys/class/net/{UPLINK}/statistics/{name}"
        return int(self.run(["cat", path], capture_output=True).stdout)

    def _connected(self) -> bool:
        return UPLINK in ip("-n", self.namespace, "-brief", "link")

    def _connect(self, relayed_s: float | None) -> None:
        if relayed_s is None:
            peer = ("type", "veth", "peer", "name", UPLINK, "netns", self.namespace)
            ip("-n", self.lab.switch, "link", "add", self._port, *peer)
        else:
            self._start_relay(relayed_s)
        ip("-n", self.namespace, "link", "set", UPLINK, "address", self.hardware_address)
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", UPLINK)
        ip("-n", self.namespace, "link", "set", UPLINK, "up")
        for other in self.lab.hosts:
            self.meet(other)
        ip("-n", self.lab.switch, "link", "set", self._port, "up")
        if not self.cut_off:
            self.mend()

    def _start_relay(self, delay_s: float) -> None:
        with netns.entered(self.namespace):
            ours = relay.open_tap(UPLINK)
        try:
            with netns.entered(self.lab.switch):
                theirs = relay.open_tap(self._port)
            try:
                program = [sys.executable, relay.__file__, str(ours), str(theirs), str(delay_s)]
                self._relay = subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=(ours, theirs))
            finally:
                os.close(theirs)
        finally:
            os.close(ours)

    def meet(self, other: Host) -> None:
        """Know the other's hardware address for good, so that a cut never shows as a failing ARP, which the
        kernel would tell local programs (EHOSTUNREACH): behind a router nobody would be told either."""
        if other is not self and self._connected():
            where = (other.address, "lladdr", other.hardware_address, "dev", UPLINK)
            ip("-n", self.namespace, "neighbour", "replace", *where, "nud", "permanent")

    def _disconnect(self) -> None:
        if self._relay:
            self._end_relay()
        elif self._connected():
            ip("-n", self.namespace, "link", "delete", UPLINK)

    def _end_relay(self) -> None:
        """Its devices go with it."""
        assert self._relay and self._relay.stdin
        self._relay.stdin.close()
        self._relay.wait()
        self._relay = None

    def close(self) -> None:
        """Kill everything that runs here, and remove the host."""
        if self._relay:
            self._end_relay()
        self.kill()
        netns.remove(self.namespace)
        for child in self._children:
            child.wait()
        if self._group:
            self._group.remove()


class Lab:
    """Some hosts, by name, and the switch between them; gone when the ``with`` block ends."""

    def __init__(self, *names: str) -> None:
        self.prefix = f"{netns.owner()}-{next(_serial)}"
        self.switch = f"{self.prefix}-switch."  # the dot: no host's name has one
        self.cpu_by = cpu.hierarchy()
        self.netem = False
        self.hosts: list[Host] = []
        self._names = names
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if reason := netns.missing():
            raise LabError(reason)
        remove_stale()
        try:
            netns.add(self.switch)
            self._undo.callback(netns.remove, self.switch)
            ip("-n", self.switch, "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
            ip("-n", self.switch, "link", "set", BRIDGE, "up")
            self.netem = self._has_netem()
            for name in self._names:
                self.add(name)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def add(self, name: str) -> Host:
        """Another host."""
        netns.add(f"{self.prefix}-{name}")
        host = Host(self, name, len(self.hosts) + 1)
        self._undo.callback(host.close)
        self.hosts.append(host)
        host.link()
        for other in self.hosts:
            other.meet(host)
        return host

    def _has_netem(self) -> bool:
        try:
            tc(self.switch, "qdisc", "add", "dev", BRIDGE, "root", "netem", "delay", "1us")
        except LabError:
            return False
        tc(self.switch, "qdisc", "del", "dev", BRIDGE, "root")
        return True


def remove_stale() -> None:
    """Remove what labs of processes left that were killed."""
    for name in netns.stale():
        with contextlib.suppress(LabError):  # another process removes it just now
            netns.remove(name)
        cpu.leftovers(name)
