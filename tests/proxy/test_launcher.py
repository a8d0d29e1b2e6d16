"""The process that the proxy is."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

from proxy_addon import launcher
from proxy_addon.listening import Listening

BURST = 300  #: asyncio's own backlog is 100


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
