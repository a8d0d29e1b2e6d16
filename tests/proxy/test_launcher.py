"""The process that the proxy is."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from contextlib import ExitStack

from proxy_addon import launcher
from proxy_addon.listening import Listening

BURST = 300  #: asyncio's own backlog is 100


LIMITED = """
import resource
from proxy_addon.ports import raise_descriptor_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
raise_descriptor_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_it_may_have_as_many_connections_as_the_system_allows() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=60)


def test_a_burst_of_connections_waits_until_it_is_accepted() -> None:
    async def burst() -> None:
        Listening(asyncio.get_running_loop(), {})
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        with ExitStack() as connections:
            for _ in range(BURST):  # the loop stands still meanwhile: nothing is accepted
                connections.enter_context(socket.create_connection(address, timeout=0.5))
        server.close()

    with asyncio.Runner(loop_factory=launcher._loop) as runner:
        runner.run(burst())
