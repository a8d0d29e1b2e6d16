"""What every child process of an agent or a coordinator has in common: it does not outlive them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def dies_with_us() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` after which the child is killed when this process dies; None off Linux.

    What counts for the kernel is the thread that starts the child, so start it from one that stays: the
    event loop's.
    """
    if sys.platform != "linux":
        return None
    parent_pid = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here, because the child may do nothing but call it

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent died between fork and prctl
            os._exit(1)

    return prepare
