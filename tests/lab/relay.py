"""A cable with a delay, for kernels without netem: frames between two TAP devices, each held for a while.

    python relay.py FD FD DELAY_S

Runs as a process of its own until its standard input ends, as it does when the lab's process ends, however.
Whole TSO segments of up to 64 KiB pass as one piece with their virtio header, so that few turns carry much.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02

PIECE_BYTES = 10 + 14 + 65_535  #: virtio_net_hdr, Ethernet header, the largest IP packet
HELD_BYTES = 64 << 20  #: of each direction at most; beyond it frames are dropped, as in any queue


def open_tap(name: str) -> int:
    """Make a TAP device in the calling thread's network namespace; it lives as long as its descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    except OSError:
        os.close(tap)
        raise
    return tap


class Direction:
    """Frames on their way from one device to the other, the oldest first."""

    def __init__(self, source: int, target: int, delay_s: float) -> None:
        self.source, self.target, self.delay_s = source, target, delay_s
        self.held: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0

    def take(self) -> None:
        """Read what has come."""
        due_s = time.monotonic() + self.delay_s
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = os.read(self.source, PIECE_BYTES)
                if self.held_bytes + len(frame) <= HELD_BYTES:
                    self.held.append((due_s, frame))
                    self.held_bytes += len(frame)

    def deliver(self) -> None:
        """Write what is due. A frame that the device refuses (it is down) is lost, as on a cable."""
        while self.held and self.held[0][0] <= time.monotonic():
            _, frame = self.held.popleft()
            self.held_bytes -= len(frame)
            with contextlib.suppress(OSError):
                os.write(self.target, frame)


def relay(one: int, other: int, delay_s: float) -> None:
    """Carry frames both ways until standard input ends."""
    directions = {one: Direction(one, other, delay_s), other: Direction(other, one, delay_s)}
    ears = [*directions, sys.stdin.fileno()]
    while True:
        due = [direction.held[0][0] for direction in directions.values() if direction.held]
        wait_s = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select(ears, [], [], wait_s)  # its timeout has microseconds; poll's has not
        if sys.stdin.fileno() in ready:
            return
        for ear in ready:
            directions[ear].take()
        for direction in directions.values():
            direction.deliver()


if __name__ == "__main__":
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # busy hosts must not lengthen the delay
    relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
