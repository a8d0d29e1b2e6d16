"""The start of the proxy, up to its ports: as one process, or as the parent of several.

A parent needs none of mitmproxy's machinery, so that is imported only where this process is to serve.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from proxy_addon import ports
from proxy_addon.settings import Settings, Source

if TYPE_CHECKING:
    from proxy_addon.life import Life

log = logging.getLogger("sollol")


def run(settings: Settings, source: Source) -> int:
    """Run the proxy until SIGINT or SIGTERM. Returns the exit status: 0, or 1 where it could not listen.

    ``settings`` are what was read from ``source``.
    """
    log_to_stderr()
    ports.raise_descriptor_limit()
    try:
        sockets, inherited = ports.acquire(settings, settings.workers)
    except ports.Taken as taken:
        print(f"sollol proxy: {taken}", file=sys.stderr)  # noqa: T201
        return 1
    if settings.workers > 1:
        from proxy_addon.workers import crew

        return crew.run(settings, source, sockets, inherited)
    from proxy_addon.launcher import serve

    def begin(life: Life) -> None:
        life.lean.sollol.reloader.settings = settings  # as read, to be compared with what is read later
        life.by_itself(source, sockets, inherited)

    held = inherited is not None
    return serve(ports.bound_to(settings, sockets), sockets, begin, held=held)


def log_to_stderr(prefix: str = "") -> None:
    """Log warnings of everybody, and what SOLLOL says; each line begins with ``prefix``."""
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s %(levelname)s {prefix}%(message)s", stream=sys.stderr
    )
    log.setLevel(logging.INFO)
    logging.getLogger("proxy_addon").setLevel(logging.INFO)
