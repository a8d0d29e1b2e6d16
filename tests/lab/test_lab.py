"""The lab itself: what its hosts promise to the tests that are built on it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import Host, Lab, needs_lab
from tests.lab.lab import shaping
from tests.lab.netns import NAMED

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 30.0
BUSY = [sys.executable, "-c", "while True: pass"]

pytestmark = needs_lab


def until(true: Callable[[], bool]) -> None:
    """Wait for what no event tells: counters of the kernel."""
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@contextlib.contextmanager
def connection(client: Host, server: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection between two hosts: the client's end, the server's end."""
    with server.socket() as listener, client.socket() as ours:
        listener.bind((server.address, 0))
        listener.listen()
        ours.settimeout(PATIENCE_S)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(PATIENCE_S)
            yield ours, theirs


def receive(source: socket.socket, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        piece = source.recv(size - len(pieces))
        assert piece, "the connection ended"
        pieces += piece
    return bytes(pieces)


def round_trip_s(one: socket.socket, other: socket.socket) -> float:
    begun_s = time.perf_counter()
    one.sendall(b"?")
    receive(other, 1)
    other.sendall(b"!")
    receive(one, 1)
    return time.perf_counter() - begun_s


def hardware_addresses() -> set[str]:
    """Of this machine's own devices."""
    return {(path / "address").read_text().strip() for path in Path("/sys/class/net").glob("*/")}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_hosts_have_addresses_of_their_own_and_the_machine_sees_none_of_them():
    with Lab("a", "b") as lab, connection(lab["a"], lab["b"]) as (ours, theirs):
        assert theirs.getpeername()[0] == lab["a"].address != lab["b"].address == ours.getpeername()[0]
        assert not hardware_addresses() & {host.hardware_address for host in lab.hosts}
        with socket.socket() as outside:
            outside.settimeout(0.2)
            with pytest.raises(OSError):
                outside.connect(ours.getpeername())


def test_labs_side_by_side_do_not_meet():
    with Lab("a", "b") as one, Lab("a", "b") as other:
        assert one["b"].address == other["b"].address
        with connection(one["a"], one["b"]) as (_, theirs), other["a"].socket() as stranger:
            refusal = stranger.connect_ex(theirs.getsockname())
        assert errno.errorcode[refusal] == "ECONNREFUSED"


def test_a_program_runs_on_its_host_with_its_own_loopback():
    with Lab("a", "b") as lab, lab["a"].socket() as here:
        here.bind(("127.0.0.1", 0))
        here.listen()
        knock = f"import socket; socket.create_connection(('127.0.0.1', {here.getsockname()[1]}))"
        assert lab["a"].run([sys.executable, "-c", knock]).returncode == 0
        refused = lab["b"].run([sys.executable, "-c", knock], check=False, capture_output=True, text=True)
        assert "ConnectionRefusedError" in refused.stderr


def test_no_round_trip_is_shorter_than_the_delays_on_its_way():
    with Lab("a", "b") as lab:
        lab["a"].link(delay_ms=3)
        lab["b"].link(delay_ms=4)
        assert lab["b"].delay_means == ("netem" if lab.netem else "userspace relay")
        with connection(lab["a"], lab["b"]) as (ours, theirs):
            for _ in range(20):
                assert round_trip_s(ours, theirs) >= 0.014
            lab["a"].link(delay_ms=1)
            lab["b"].link()
            assert lab["b"].delay_means == "none"
            assert round_trip_s(ours, theirs) >= 0.002


def test_much_passes_a_delayed_link_whole():
    with Lab("a", "b") as lab, connection(lab["a"], lab["b"]) as (ours, theirs):
        lab["b"].link(delay_ms=2)
        sent = os.urandom(1 << 20) * 16
        sender = threading.Thread(target=ours.sendall, args=(sent,))
        sender.start()
        assert receive(theirs, len(sent)) == sent
        sender.join()


def test_a_rate_bounds_what_passes():
    rate_bit_s, sent = 16e6, bytes(2_000_000)
    with Lab("a", "b") as lab, connection(lab["a"], lab["b"]) as (ours, theirs):
        lab["b"].link(rate_bit_s=rate_bit_s)
        for source, target in ((ours, theirs), (theirs, ours)):
            begun_s = time.perf_counter()
            sender = threading.Thread(target=source.sendall, args=(sent,))
            sender.start()
            receive(target, len(sent))
            burst_bytes = 32_000
            assert time.perf_counter() - begun_s >= (len(sent) - burst_bytes) * 8 / rate_bit_s
            sender.join()


@pytest.mark.parametrize("delay_ms", [0, 2])
def test_a_cut_is_silent_and_mending_it_resumes_the_stream_without_loss(delay_ms):
    with Lab("a", "b") as lab, connection(lab["a"], lab["b"]) as (ours, theirs):
        lab["b"].link(delay_ms=delay_ms)
        round_trip_s(ours, theirs)
        lab["b"].cut()
        before = {host: (host.sent_bytes(), host.received_bytes()) for host in lab.hosts}
        ours.sendall(b"to b, while it is cut off")
        theirs.sendall(b"to a, meanwhile")
        # Both tried again and again, as nobody told them anything.
        for host in lab.hosts:
            until(lambda host=host: host.sent_bytes() > before[host][0] + 300)
            assert host.received_bytes() == before[host][1]
        for end in (ours, theirs):
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        lab["b"].mend()
        assert receive(theirs, 25) == b"to b, while it is cut off"
        assert receive(ours, 15) == b"to a, meanwhile"
        round_trip_s(ours, theirs)


def test_who_connects_to_a_host_that_is_cut_off_hears_nothing():
    with Lab("a", "b") as lab, lab["b"].socket() as listener, lab["a"].socket() as ours:
        listener.bind((lab["b"].address, 0))
        listener.listen()
        lab["b"].cut()
        ours.settimeout(4)  # beyond the 3 s after which failing ARP would tell
        with pytest.raises(TimeoutError):
            ours.connect(listener.getsockname())


def test_a_host_stays_cut_off_when_its_link_changes():
    with Lab("a", "b") as lab, connection(lab["a"], lab["b"]) as (ours, theirs):
        lab["b"].cut()
        lab["b"].link(delay_ms=1)
        ours.sendall(b"?")
        sent_bytes = lab["a"].sent_bytes()
        until(lambda: lab["a"].sent_bytes() > sent_bytes)
        assert lab["b"].received_bytes() == 0
        lab["b"].mend()
        assert receive(theirs, 1) == b"?"


def test_a_cpu_share_holds_back_what_runs_on_the_host_and_nothing_else():
    with Lab("slow", "fast") as lab:
        if not lab["slow"].cpu_means.startswith("cgroup"):
            pytest.skip(lab["slow"].cpu_means)
        lab["slow"].cpu(0.2)
        for host in lab.hosts:
            host.popen(BUSY)
        until(lambda: lab["slow"].throttled() > 5)
        assert lab["fast"].throttled() == 0
        lab["slow"].cpu(None)
        held_back = lab["slow"].throttled()
        lab["fast"].cpu(0.2)
        until(lambda: lab["fast"].throttled() > 5)
        assert lab["slow"].throttled() == held_back


def test_killing_a_host_kills_what_runs_there_and_leaves_the_others():
    with Lab("a", "b") as lab:
        on_a, on_b = (host.popen(["sleep", "1000"]) for host in lab.hosts)
        lab["a"].kill()
        assert on_a.wait(PATIENCE_S) == -signal.SIGKILL
        assert on_b.poll() is None
        with connection(lab["b"], lab["a"]):
            pass


def test_nothing_is_left_of_a_lab():
    with Lab("a", "b") as lab:
        lab["b"].link(delay_ms=1)
        relays = [] if lab.netem else [lab["b"]._relay.pid]
        shell = lab["a"].popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        grandchild = int(shell.stdout.readline())
        shell.stdout.close()
        namespaces = [host.namespace for host in lab.hosts] + [lab.switch]
        assert all((NAMED / name).exists() for name in namespaces)
        groups = [host._group.path for host in lab.hosts if host._group]
        assert all(group.exists() for group in groups)
    assert shell.returncode == -signal.SIGKILL
    assert not any(map(running, [grandchild, *relays]))
    assert not any((NAMED / name).exists() for name in namespaces)
    assert not any(group.exists() for group in groups)


CRASHING = """
import os, signal, subprocess
from tests.lab import Lab
with Lab("a", "b") as lab:
    lab["b"].link(delay_ms=1)
    child = lab["a"].popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
    relay = [] if lab.netem else [lab["b"]._relay.pid]
    print(lab.prefix, child.pid, *relay, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_lab_removes_what_a_killed_process_left():
    crashed = subprocess.run([sys.executable, "-c", CRASHING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert crashed.returncode == -signal.SIGKILL
    prefix, *pids = crashed.stdout.split()
    with Lab("a"):
        assert not list(NAMED.glob(f"{prefix}*"))
        until(lambda: not any(running(int(pid)) for pid in pids))
        groups = Path("/sys/fs/cgroup")
        assert not list(groups.glob(f"{prefix}*")) + list(groups.glob(f"*/{prefix}*"))


@pytest.mark.parametrize(
    ("netem", "delay_ms", "rate_bit_s", "means"),
    [
        (True, 0, None, None),
        (True, 2.5, None, "netem delay 2500us limit 100000"),
        (True, 0, 1e6, "netem delay 0us rate 1000000bit limit 100000"),
        (False, 5, None, None),
        (False, 5, 1e9, "tbf rate 1000000000bit burst 250000 limit 6500000"),
        (False, 0, 1e6, "tbf rate 1000000bit burst 5000 limit 267144"),
    ],
)
def test_what_shapes_a_link(netem, delay_ms, rate_bit_s, means):
    assert shaping(netem, delay_ms, rate_bit_s) == (means.split() if means else None)
