"""The response hooks: headers that name the node, the tee, the pieces of streams made here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mitmproxy import http

from proxy_addon import plans, record
from proxy_addon.attempt import NextChunk
from proxy_addon.heads import first, put
from proxy_addon.record import Record
from proxy_addon.relay import Tee, framing_of


class Answer:
    """Lets answers through as they come."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Where the answer is known before the body has come, no ``100 Continue`` asks for the body."""
        if flow.response is not None:
            flow.request.headers.pop("expect", None)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """Name the node, and stream whatever is not an error."""
        rec, response = record.of(flow), flow.response
        if rec is None or response is None:
            return
        rec.shard_plan = plans.of_answer(response.headers, rec.node, rec.ask.key if rec.ask else "")
        mark(response, rec)
        if rec.placed and response.status_code < 400:
            framing = framing_of(response)
            annotate = rec.flight is not None and _annotated(rec)
            # The loop's own clock, for it is looked at with every piece.
            response.stream = Tee(rec, framing, asyncio.get_running_loop().time, annotate)
            may_grow = annotate if framing == "whole" else framing != "opaque"
            if may_grow and first(response.headers, b"content-length"):
                # By the routing, or by the error that ends a stream which breaks off: chunks need no length
                # (an HTTP/1.0 client reads to the end).
                del response.headers["content-length"]
                response.headers["transfer-encoding"] = "chunked"

    async def sollol_next_chunk(self, chunk: NextChunk) -> None:
        """Bring the next piece of an answer that the proxy makes itself; none once the client has left."""
        rec = record.of(chunk.flow)
        if rec is None or rec.stream is None:
            return
        if rec.first_byte_s is None:
            rec.first_byte_s = self.now()
        source = rec.stream.chunks
        following = asyncio.ensure_future(anext(source, None))
        rec.on_left.append(following.cancel)
        try:
            chunk.data = await following
        except asyncio.CancelledError:
            if not rec.left:
                raise
        finally:
            if following.cancel in rec.on_left:
                rec.on_left.remove(following.cancel)
        if chunk.data is None:
            close = getattr(source, "aclose", None)
            if close is not None:
                await close()


def _annotated(rec: Record) -> bool:
    """Whether ``_sollol_routing`` is written into the final object."""
    return rec.settings is not None and rec.settings.routing_metadata == "body"


def mark(response: http.Response, rec: Record) -> None:
    """The headers of every answer: which request it was, where it went, after what tries and wait."""
    marks = {"x-sollol-request-id": rec.id}
    if rec.attempts and rec.placed:
        marks["x-sollol-node"] = rec.attempts[-1].node
        marks["x-sollol-attempts"] = str(len(rec.attempts))
    if rec.decisions and rec.decisions[-1].node is not None:
        marks["x-sollol-policy"] = rec.decisions[-1].policy
        marks["x-sollol-expected-s"] = f"{rec.decisions[-1].expected_s:.3f}"
    if rec.queue_position is not None:
        marks["x-sollol-queue-wait"] = f"{rec.queued_s or 0.0:.3f}"
        marks["x-sollol-queue-position"] = str(rec.queue_position)
        marks["x-sollol-queue-expected-wait"] = f"{rec.expected_wait_s or 0.0:.3f}"
    put(response.headers, marks)
