"""An attempt at a node, and what is asked when it fails or when the proxy itself has the next word.

Whatever carries a request (the lane, or mitmproxy's layers) decides nothing: it asks through two hooks of our
own, ``sollol_failure`` and ``sollol_next_chunk``, which any addon may implement asynchronously.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mitmproxy import http
from mitmproxy.proxy.commands import StartHook

from proxy_addon import errors, record

#: What mitmproxy makes of a cancelled connect (``ConnectionHandler.open_connection``).
CONNECT_CANCELLED = "connection cancelled"

Phase = Literal["connect", "reset", "status", "first_line", "empty"]


@dataclass(eq=False)
class Failure:
    """An attempt that failed before the client saw a byte. The hook sets ``retry`` or ``response``."""

    flow: http.HTTPFlow
    phase: Phase
    detail: str
    status: int | None = None
    reused: bool = False  #: the upstream connection had served an earlier request
    replayable: bool = True  #: False: the request's body is gone, only an answer can be given
    retry: bool = False  #: set: the flow's address was changed, send the request again
    response: http.Response | None = None  #: set: what the client gets instead


@dataclass
class SollolFailureHook(StartHook):
    """Asks what to do about a failed attempt; may take its time (back-off)."""

    failure: Failure


@dataclass(eq=False)
class NextChunk:
    """A place for the next piece of an answer that the proxy itself streams; None ends it."""

    flow: http.HTTPFlow
    data: bytes | None = None


@dataclass
class SollolNextChunkHook(StartHook):
    """Asks for the next piece of ``record.stream``."""

    chunk: NextChunk


def final_answer(failure: Failure) -> http.Response:
    """The client's answer to a failure that is not retried; a policy that gave none has failed itself."""
    if failure.response is not None:
        return failure.response
    if failure.phase == "first_line":  # the node's own words, which the policy lets stand
        rec = record.of(failure.flow)
        protocol, request_id = (rec.protocol, rec.id) if rec else ("native", "")
        return errors.response(protocol, failure.status or 500, failure.detail, request_id=request_id)
    return own_failure(failure.flow)


def own_failure(flow: http.HTTPFlow) -> http.Response:
    """The client's answer where SOLLOL itself failed."""
    rec = record.of(flow)
    return errors.internal(rec.protocol if rec else "native", rec.id if rec else "")
