"""An exception in a hook must end as a clear error, not as a request that goes on without its hook.

mitmproxy logs what a hook raises and carries on ("hooks fail open"). :func:`protect` wraps the hooks of an
addon: the exception is logged once with its traceback under the request's id, counted, and the client gets an
error in its own protocol.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from mitmproxy import http

from proxy_addon import errors, record
from proxy_addon.endpoints import protocol_of
from proxy_addon.http_stream import Failure

log = logging.getLogger(__name__)

#: Hooks in which an answer can still be given in place of the flow's own way.
ANSWERABLE = ("requestheaders", "request", "responseheaders", "sollol_failure")
#: Hooks that only look; the flow goes on.
LOOKING = (
    "response",
    "error",
    "sollol_next_chunk",
    "server_connect",
    "server_connected",
    "server_connect_error",
)


def protect[T](addon: T, on_error: Callable[[str], None]) -> T:
    """Wrap the hooks of ``addon`` in place; ``on_error`` is told the name of a hook that raised."""
    for name in (*ANSWERABLE, *LOOKING):
        hook = getattr(addon, name, None)
        if hook is not None:
            setattr(addon, name, _wrap(hook, name, on_error))
    return addon


def _wrap(hook: Callable[..., Any], name: str, on_error: Callable[[str], None]) -> Callable[..., Any]:
    def failed(subject: Any) -> None:
        on_error(name)
        flow = subject.flow if isinstance(subject, Failure) else subject
        rec = record.of(flow) if isinstance(flow, http.HTTPFlow) else None
        log.exception("%s failed (request id %s)", name, rec.id if rec else "none")
        if name not in ANSWERABLE or not isinstance(flow, http.HTTPFlow):
            return
        protocol = rec.protocol if rec else protocol_of(flow.request.path)
        answer = errors.internal(protocol, rec.id if rec else "")
        if isinstance(subject, Failure):
            subject.retry, subject.response = False, answer
        else:
            flow.response = answer
        if rec is not None:
            rec.outcome = "failed"

    if inspect.iscoroutinefunction(hook):

        @functools.wraps(hook)
        async def protected_async(subject: Any) -> None:
            try:
                await hook(subject)
            except asyncio.CancelledError:
                raise
            except Exception:  # noqa: BLE001 - the outermost boundary of a hook
                failed(subject)

        return protected_async

    @functools.wraps(hook)
    def protected(subject: Any) -> None:
        try:
            hook(subject)
        except Exception:  # noqa: BLE001 - the outermost boundary of a hook
            failed(subject)

    return protected
