"""Tells systemd how the service is doing (sd_notify): a datagram to the socket that it names."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(message: str) -> bool:
    """Send a state such as ``READY=1`` and return whether a service manager listens.

    Raises OSError if it named a socket that takes nothing.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):  # a socket in Linux' abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.sendall(message.encode())
    return True


def watchdog_period_s() -> float | None:
    """Return how often systemd wants to hear ``WATCHDOG=1``: half of its limit; None if it does not."""
    limit_us = os.environ.get("WATCHDOG_USEC")
    meant_for = os.environ.get("WATCHDOG_PID")
    if not limit_us or (meant_for and int(meant_for) != os.getpid()):
        return None
    return int(limit_us) / 1e6 / 2


async def keep_watchdog_fed() -> None:
    """Send ``WATCHDOG=1`` for as long as the event loop turns; return at once if nobody wants to hear it."""
    period_s = watchdog_period_s()
    while period_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s)
