"""A thread for calls that block, and that may never come back."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress


class Worker[T]:
    """Runs one blocking function, one call at a time, in a thread of its own.

    A driver can hang in a call for minutes. A caller may stop waiting at any time; the next caller then waits
    for the call that still runs instead of adding another. The thread is a daemon, so that a hung driver does
    not keep the process from ending, which is why this is no ``ThreadPoolExecutor``.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._function = function
        self._calls: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Future[T]]] = (
            queue.SimpleQueue()
        )
        self._running: asyncio.Future[T] | None = None
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    async def call(self) -> T:
        """Return what the function returned, or raise what it raised; cancelling leaves the call running."""
        if self._running is None or self._running.done():
            loop = asyncio.get_running_loop()
            self._running = loop.create_future()
            self._calls.put((loop, self._running))
        return await asyncio.shield(self._running)

    def _serve(self) -> None:
        while True:
            loop, future = self._calls.get()
            try:
                result = self._function()
            except Exception as error:  # noqa: BLE001 - the boundary of a thread: it belongs to the caller
                _post(loop, future, error=error)
            else:
                _post(loop, future, result=result)


def _post[T](
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[T],
    *,
    result: T | None = None,
    error: Exception | None = None,
) -> None:
    def settle() -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
            future.exception()  # whoever asked may have left: that is no "exception never retrieved"
        else:
            future.set_result(result)  # type: ignore[arg-type]  # T may itself be None

    # RuntimeError: the loop was closed while the call ran, so nobody is left to tell.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
