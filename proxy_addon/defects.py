"""Where exceptions of SOLLOL's own code end that no hook of a request can answer for.

The event loop's exception handler is their one address. Timers, callbacks and forgotten tasks lead there by
themselves; what is caught elsewhere, so that something else may go on, is sent there by :func:`report`. Each
is logged once, with its traceback and the request's id where there is one, and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

RESTART_S = 1.0  #: until work that a defect has ended is begun anew; doubled each time, up to
RESTART_MAX_S = 60.0

CALLBACK, TASK = "callback", "task"  #: what is counted where nobody says more: a timer's call, a task


def report(defect: BaseException, where: str, request_id: str = "") -> None:
    """Have ``defect`` logged and counted under ``where``: a word of ours, for it labels a metric."""
    about = f" (request id {request_id})" if request_id else ""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"{where} failed{about}", "exception": defect, "where": where}
    )


def listen(count: Callable[[str], None]) -> None:
    """Log and count what reaches the running loop's exception handler; call it once the loop is set up.

    What is no exception of ours (a transport's last words) stays with the handler that was there before.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        defect = context.get("exception")
        if defect is None or (isinstance(defect, OSError) and "where" not in context):
            if before is not None:
                before(loop, context)
            else:
                loop.default_exception_handler(context)
            return
        count(context.get("where") or (CALLBACK if "handle" in context else TASK))
        log.error("%s", context["message"], exc_info=defect)

    loop.set_exception_handler(handle)


def keep_running(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """A task that does ``work``; a defect that ends it is reported under ``name``, and it is begun anew."""

    async def kept() -> None:
        pause_s = RESTART_S
        while True:
            try:
                return await work()
            except Exception as defect:  # noqa: BLE001 - the outermost boundary of a task
                report(defect, name)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MAX_S)

    return asyncio.create_task(kept(), name=name)
