"""A request's body on its way to a node, too large to hold."""

from __future__ import annotations

import asyncio
from typing import Self

from proxy_addon.lane.client import ClientConnection
from proxy_addon.lane.framing import END, chunk
from proxy_addon.lane.head import AnswerHead
from proxy_addon.lane.upstream import Upstream


class Upload:
    """Passes the body on as it comes, within a context; the answer may begin before its end."""

    def __init__(self, client: ClientConnection, upstream: Upstream, method: str, *, chunked: bool) -> None:
        self._client = client
        self._upstream = upstream
        self._chunked = chunked
        upstream.on_writable = self._read_client
        self._body = asyncio.ensure_future(client.read(self._send))
        self.head: asyncio.Future[AnswerHead] = asyncio.ensure_future(upstream.head(method))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._body, self.head):
            task.cancel()
        await asyncio.gather(self._body, self.head, return_exceptions=True)

    async def passed(self) -> bool:
        """Wait for the body's end or for an answer; whether the body has ended, but for :meth:`end`.

        Raises ClientLeft, and BadBody for one that cannot be passed on.
        """
        await asyncio.wait((self._body, self.head), return_when=asyncio.FIRST_COMPLETED)
        if self._body.done():
            self._body.result()
        return self._body.done()

    def end(self) -> None:
        """Let the node know that this was all."""
        if self._chunked:
            self._upstream.send(END)

    def _send(self, data: bytes) -> None:
        self._upstream.send(chunk(data) if self._chunked else data)

    def _read_client(self, go_on: bool) -> None:
        if go_on:
            self._client.resume()
        else:
            self._client.pause()
