"""Workers ask each other what they know, over unix sockets in the state directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
from aiohttp import web

from proxy_addon import sockets
from proxy_addon.workers.worker import Worker

ANSWER_S = 2.0  #: one that is being started again, or hangs, is left out
#: What one worker says to a path with its query: HTTP status and body.
Answer = Callable[[str], tuple[int, bytes]]


class Siblings:
    """The other workers; ``answer`` is what this one says to them."""

    def __init__(self, worker: Worker, state_dir: Path, answer: Answer) -> None:
        self.worker = worker
        self._state_dir = state_dir
        self._answer = answer
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Answer from now on, if there is anybody to ask. Raises OSError."""
        if self.worker.of == 1:
            return
        application = web.Application()
        application.router.add_get("/{path:.*}", self._told)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.SockSite(self._runner, sockets.listen_unix(self._path(self.worker.number))).start()

    async def stop(self) -> None:
        """Answer no more; safe to call twice."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def ask(self, path: str) -> dict[int, tuple[int, bytes]]:
        """What each worker that answers says to ``path``, this one included, by number."""
        others = [number for number in range(1, self.worker.of + 1) if number != self.worker.number]
        told = await asyncio.gather(*(self._ask(number, path) for number in others))
        found = {number: each for number, each in zip(others, told, strict=True) if each is not None}
        found[self.worker.number] = self._answer(path)
        return dict(sorted(found.items()))

    async def _told(self, request: web.Request) -> web.Response:
        status, body = self._answer(request.path_qs)
        return web.Response(status=status, body=body)

    async def _ask(self, number: int, path: str) -> tuple[int, bytes] | None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        try:
            with sockets.unix_address(self._path(number)) as address:
                connector = aiohttp.UnixConnector(address)
                async with (
                    aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                    session.get(f"http://worker{path}") as response,
                ):
                    return response.status, await response.read()
        except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
            return None

    def _path(self, number: int) -> Path:
        return self._state_dir / f"worker-{number}.sock"
