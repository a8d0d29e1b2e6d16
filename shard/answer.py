"""One generation on its way from llama-server to the client, streamed or gathered.

Nothing is sent before the model's first piece, so that any failure until then keeps its status; only how a
load goes on is told before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from agent.report import ShardLoad
from shard.llama_server import LlamaServer
from shard.node import STARTED, UPSTREAM_ERRORS, json_answer, now
from shard.replies import (
    CUT_STREAM,
    Piece,
    RenderedReply,
    Reply,
    SseReader,
    UpstreamError,
    error_message,
    statistics,
)
from shard.runners import Runner
from shard.translate import Refusal

Shape = Callable[[str, str, Piece], dict[str, Any]]
Message = Mapping[str, Any]


class Answer:
    """One generation on its way to the client, streamed or gathered."""

    def __init__(self, request: web.Request, shape: Shape) -> None:
        self.request = request
        self.shape = shape
        self.ask: Mapping[str, Any] = {}
        self.context: list[int] | None = None
        self._started_ns = time.monotonic_ns()
        self._load_ns = 0

    def loaded(self) -> None:
        """Note that the model is there: the wait so far is the answer's ``load_duration``."""
        self._load_ns = time.monotonic_ns() - self._started_ns

    async def tell(self, load: ShardLoad) -> None:
        """Tell a client that streams how far the load is, in a line that adds nothing to the answer."""
        if self.ask.get("stream") is False:
            return
        line = self._object(Piece()) | {"_sollol": {"load": load.model_dump(exclude={"plan"})}}
        response = self.request[STARTED] = await self._response()
        await self._write(response, line)

    async def lifecycle(self, reason: str) -> web.StreamResponse:
        """Return the answer to a request that asks nothing."""
        return await self._only(self._object(Piece()) | {"done": True, "done_reason": reason})

    async def rendered(self, prompt: str, messages: Sequence[Message]) -> web.StreamResponse:
        """Return the answer to a request that only wants to see its prompt."""
        images = sum(len(message.get("images") or ()) for message in messages)
        info = {"rendered_template": prompt, "image_count": images}
        return await self._only(self._object(Piece()) | {"_debug_info": info})

    async def relay(
        self,
        runner: Runner,
        path: str,
        body: Mapping[str, Any],
        reply: Reply,
        again: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> web.StreamResponse:
        """Return the client's response, complete. Raises what may still be answered with a status.

        Where ``reply`` interrupts the run, another one goes on with the body that ``again`` returns.
        """
        async with contextlib.aclosing(self._lines(runner.server, path, body, reply, again)) as lines:
            if self.ask.get("stream") is False:
                return json_answer(self._gathered([line async for line in lines]))
            return await self._stream(lines)

    async def _lines(
        self,
        server: LlamaServer,
        path: str,
        body: Mapping[str, Any],
        reply: Reply,
        again: Callable[[], Awaitable[Mapping[str, Any]]] | None,
    ) -> AsyncGenerator[dict[str, Any]]:
        tokens: list[int] = []
        silent: list[int] = []
        async with contextlib.aclosing(_pieces(server, path, body, reply)) as pieces:
            async for piece in pieces:
                # Half of a character that spans tokens has no text of its own yet. A token that never gets
                # one, such as the end's, belongs to no context: Ollama takes it from the text.
                silent += piece.tokens
                if piece.content or piece.thinking:
                    tokens, silent = tokens + silent, []
                if piece.content or piece.thinking or piece.tool_calls or piece.logprobs:
                    yield self._object(piece)
        if again is not None and isinstance(reply, RenderedReply) and reply.interrupted:
            async with contextlib.aclosing(self._lines(server, path, await again(), reply, None)) as lines:
                async for line in lines:
                    yield line
            return
        if reply.final is None:
            raise UpstreamError(CUT_STREAM)
        last = self._object(Piece())
        last |= statistics(reply.final, time.monotonic_ns() - self._started_ns, self._load_ns)
        if self.context is not None:
            last["context"] = [*self.context, *tokens]
        yield last

    async def _stream(self, lines: AsyncIterator[dict[str, Any]]) -> web.StreamResponse:
        # The first line is awaited before the headers go out, so that errors until then keep their status.
        line = await anext(lines)
        response = await self._response()
        await self._write(response, line)
        try:
            async for line in lines:
                await self._write(response, line)
        except UPSTREAM_ERRORS as error:
            await self._write(response, {"error": str(error)})
        except Refusal as refusal:
            await self._write(response, {"error": refusal.message})
        await response.write_eof()
        return response

    async def _response(self) -> web.StreamResponse:
        """Return the stream to the client, begun if it was not."""
        response: web.StreamResponse | None = self.request.get(STARTED)
        if response is None:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(self.request)
        return response

    @staticmethod
    async def _write(response: web.StreamResponse, line: Mapping[str, Any]) -> None:
        await response.write(orjson.dumps(line) + b"\n")

    async def _only(self, line: dict[str, Any]) -> web.StreamResponse:
        if self.request.get(STARTED) is None:
            return json_answer(line)
        response = await self._response()
        await self._write(response, line)
        await response.write_eof()
        return response

    def _object(self, piece: Piece) -> dict[str, Any]:
        return self.shape(self.ask["model"], now(), piece)

    def _gathered(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        whole = Piece()
        for line in lines:
            part = line.get("message", line)
            whole.content += part.get("content", part.get("response", ""))
            whole.thinking += part.get("thinking", "")
            whole.tool_calls += part.get("tool_calls", [])
            whole.logprobs += line.get("logprobs", [])
        return lines[-1] | self.shape(self.ask["model"], lines[-1]["created_at"], whole) | {"done": True}


async def _pieces(
    server: LlamaServer, path: str, body: Mapping[str, Any], reply: Reply
) -> AsyncGenerator[Piece]:
    reader = SseReader()
    async with server.request("POST", path, body) as upstream:
        await _refuse_errors(server, upstream)
        async for chunk in server.chunks(upstream):
            for event in reader.feed(chunk):
                if (piece := reply.take(event)) is not None:
                    yield piece
                if isinstance(reply, RenderedReply) and reply.interrupted:
                    return


async def _refuse_errors(server: LlamaServer, upstream: aiohttp.ClientResponse) -> None:
    if upstream.status >= 400:
        body = b"".join([chunk async for chunk in server.chunks(upstream)])
        raise Refusal(upstream.status, error_message(body))
