"""A body on its way from a node to a client: followed to know its end, not parsed.

What comes from the node in whole chunks that end whole lines goes out as it came, one send per receive. The
rest (a line in pieces, a body with a length) goes through the :class:`~proxy_addon.relay.Tee`. A token is a
piece, so that each call here is paid for every token of every stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy_addon.lane.framing import Chunked, FramingError, chunk
from proxy_addon.lane.upstream import ClientLeft, Lost, Upstream
from proxy_addon.relay import HOLD_LINE_BYTES, Tee


class Splice:
    """The sink of one answer. :meth:`run` returns when its end, or what there is of it, has been written."""

    __slots__ = ("_between", "_chunked", "_done", "_follower", "_held", "_raw", "_tee", "_upstream", "_write")

    def __init__(
        self, upstream: Upstream, write: Callable[[bytes], None], tee: Tee, *, chunked: bool
    ) -> None:
        self._upstream = upstream
        self._write = write
        self._tee = tee
        self._chunked = chunked
        self._follower = upstream.follower
        self._raw = self._follower if chunked and isinstance(self._follower, Chunked) else None
        self._between = (
            self._raw is not None and self._raw.between
        )  # two chunks, so that the next may go out raw
        self._held = b""  # the beginning of a chunk
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Pass on the body to its end.

        Raises:
            Lost: it broke off.
            ClientLeft: :meth:`interrupt` was called.
        """
        begun = self._upstream.relay(self)
        if begun:
            self.data(begun)
        await self._done

    def data(self, data: bytes) -> None:
        """Pass on what has come; a defect on the way is :meth:`run`'s to raise."""
        try:
            raw = self._raw
            if (
                raw is not None
                and self._between
                and not self._held
                and raw.whole(data) == len(data)
                and self._tee.passes(data)
            ):
                self._write(data)
            else:
                self._pass(data)
        except FramingError as error:
            self._send(error.payload)
            self._fail(Lost(f"the answer's framing is broken: {error}"))
        except Exception as defect:  # noqa: BLE001 - of a callback, raised again where a request ends
            self._fail(defect)

    def _pass(self, data: bytes) -> None:
        raw = self._raw
        while raw is not None and not self._between and data and not raw.ended:
            # In the middle of a chunk: behind it the chunks can go out as they come again.
            size = raw.step(data)
            self._send(raw.feed(data[:size]))
            data, self._between = data[size:], raw.between
        if raw is not None and self._between:
            data = self._passed(raw, self._held + data)
        if data:
            self._send(self._follower.feed(data))
            self._between = raw is not None and raw.between
        if self._follower.ended:
            self._end()

    def _send(self, payload: bytes) -> None:
        out = self._tee(payload) if payload else b""
        if out:
            self._write(chunk(out) if self._chunked else out)

    def _passed(self, raw: Chunked, data: bytes) -> bytes:
        """Pass on whole chunks as they are, keep the beginning of one; what is left has to be followed."""
        self._held = b""
        size = raw.whole(data)
        if size:
            chunks = data if size == len(data) else data[:size]
            if not self._tee.passes(chunks):
                return data
            self._write(chunks)
            data = data[size:]
        if len(data) <= HOLD_LINE_BYTES and raw.awaits(data):
            self._held, data = data, b""
        return data

    def lost(self, reason: str, clean: bool) -> None:
        """The node's connection has ended, which may be the body's end."""
        if clean:
            try:
                self._follower.end()
            except FramingError as error:
                reason = str(error)
            else:
                self._end()
                return
        self._fail(Lost(reason))

    def interrupt(self) -> None:
        """The client has left."""
        self._fail(ClientLeft())

    def _end(self) -> None:
        self._upstream.sink = None
        if not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._upstream.sink = None
        if not self._done.done():
            self._done.set_exception(error)
