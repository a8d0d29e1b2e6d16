"""One request and its answer: from the first hook to the last, as one coroutine.

The hooks and their order are mitmproxy's, and ours (``sollol_failure``, ``sollol_next_chunk``). What is held
back and what may be replaced is :mod:`proxy_addon.relay`'s to say; what is done about a failure, the addons'.
Nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from secrets import token_hex
from time import time

from mitmproxy import flow as mitm_flow
from mitmproxy import hooks, http
from mitmproxy.connection import Client, Server
from mitmproxy.proxy.layers.http import (
    HttpErrorHook,
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
    HttpResponseHook,
)

from proxy_addon import defects, errors, record, relay
from proxy_addon.attempt import (
    Failure,
    NextChunk,
    Phase,
    SollolFailureHook,
    SollolNextChunkHook,
    final_answer,
    own_failure,
)
from proxy_addon.endpoints import Handling
from proxy_addon.heads import first
from proxy_addon.lane.client import BadBody, ClientConnection
from proxy_addon.lane.framing import END, Length, UntilClose, chunk
from proxy_addon.lane.head import AnswerHead, RequestHead, answer_bytes, request_bytes
from proxy_addon.lane.node_side import NodeSide
from proxy_addon.lane.pool import Pool
from proxy_addon.lane.splice import Splice
from proxy_addon.lane.upload import Upload
from proxy_addon.lane.upstream import ClientLeft, Lost, Upstream
from proxy_addon.lean_addons import LeanAddons

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LEFT = "client disconnected"
ONE_SEND_BYTES = 64 << 10  #: a head and a body of up to so much are joined for one send
NOWHERE = Server(address=None)  #: of a request that has not been given a node yet


class LaneFlow(http.HTTPFlow):
    """A flow that an exchange carries."""

    def __init__(self, client_conn: Client, exchange: Exchange) -> None:
        # All that the parent's does, but for its id: a UUID costs a call to the kernel.
        self.id = f"{_PROCESS}-{next(_NUMBERS)}"
        self.client_conn, self.server_conn = client_conn, NOWHERE
        self.live = True
        self.timestamp_created = time()
        self.intercepted = False
        self._resume_event = self._backup = None
        self.marked = self.comment = ""
        self.is_replay = None
        self.metadata = {}
        self.exchange = exchange


LaneFlow.type = "http"  # which mitmproxy derives from the name of the class
_NUMBERS = count(1)
_PROCESS = token_hex(8)


class Exchange:
    """The life of one request on ``client``."""

    def __init__(
        self,
        client: ClientConnection,
        head: RequestHead,
        addons: LeanAddons,
        pool: Pool,
        connect_limit_s: Callable[[], float],
    ) -> None:
        self.client = client
        self.flow = LaneFlow(client.client, self)
        self.flow.request = head.request
        self._head = head
        self._addons = addons
        self.node = NodeSide(addons, pool, connect_limit_s)
        self._begun = False  # the client has been sent some of an answer
        self._over = False  # the last hook has had its turn
        self._keep = head.keep_alive
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. Most hooks never wait, so that most requests are on their way when this returns."""
        self._task = asyncio.Task(self._run(), loop=asyncio.get_running_loop(), eager_start=True)

    # -- told from outside ----------------------------------------------------------------------------

    def client_left(self) -> None:
        """Whoever waits for this client's sake stops."""
        rec = record.of(self.flow)
        if rec is not None:
            rec.client_left()
        self.node.interrupt()

    # -- the way --------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._request()
        except ClientLeft:
            await self._broken(LEFT)
        except BadBody as bad:
            await self._refuse(bad)
        except Exception as defect:  # noqa: BLE001 - the outermost boundary of a request
            await self._failed(defect)
        finally:
            self.node.drop()
            self.flow.live = False
            if self._keep and self.client.is_sending:
                # Who waits for a 100 Continue may or may not send its body now; nobody could tell which.
                self._keep = not self._head.expects_continue and await self.client.discard()
            self.client.finished(keep=self._keep)
            del self.flow  # they refer to each other: what is left would wait for the collector

    async def _request(self) -> None:
        flow, request = self.flow, self.flow.request
        await self._hook(HttpRequestHeadersHook)
        if flow.response is not None:
            await self._answer(flow.response)
            return
        if self._head.expects_continue:
            self._head.expects_continue = False
            request.headers.pop("expect", None)
            self.client.write(CONTINUE)
        if request.stream:
            await self._upload()
            return
        rec = record.of(flow)
        request.data.content = await self.client.body(rec.held.grow if rec and rec.held else None)
        request.data.timestamp_end = time()
        await self._hook(HttpRequestHook)
        if flow.response is not None:
            await self._answer(flow.response)
        elif rec is not None and rec.stream is not None:
            await self._serve(rec.stream)
        elif rec is None or not rec.placed:
            # A hook has failed: without a placement the request must go nowhere.
            await self._answer(own_failure(flow))
        else:
            # Its node may just have closed a kept connection: what must not be sent twice gets its own.
            fresh = rec.endpoint is None or rec.endpoint.handling is not Handling.ROUTE
            while (upstream := await self._connected(fresh)) is not None:
                self._send(upstream)
                if await self._answered(upstream, upstream.head(request.method)):
                    return

    # -- attempts -------------------------------------------------------------------------------------

    async def _connected(self, fresh: bool) -> Upstream | None:
        """A connection to the chosen node, or to the next one; None where there is an answer instead.

        ``fresh``: none that has been used.
        """
        request = self.flow.request
        while True:
            address = (request.host, request.port)
            error = await self.node.connect(self.client.client, address, fresh=fresh)
            upstream = self.node.upstream
            if upstream is not None:
                self.flow.server_conn = upstream.server
            if self.client.left:
                raise ClientLeft
            if upstream is not None:
                return upstream
            failure = Failure(self.flow, "connect", error)
            await self._ask(failure)
            if not failure.retry:
                await self._answer(final_answer(failure))
                return None

    def _send(self, upstream: Upstream) -> None:
        content = self.flow.request.raw_content or b""
        head = request_bytes(self.flow.request, len(content))
        if len(content) <= ONE_SEND_BYTES:
            upstream.send(head + content)
        else:
            upstream.send(head)
            upstream.send(content)

    async def _failure(self, phase: Phase, detail: str, status: int | None = None) -> bool:
        """The attempt has failed; whether the client has been answered, instead of another attempt."""
        reused = self.node.reused
        self.node.drop()
        failure = Failure(
            self.flow, phase, detail, status, reused=reused, replayable=not self.flow.request.stream
        )
        await self._ask(failure)
        return await self._settled(failure)

    async def _settled(self, failure: Failure) -> bool:
        if not failure.retry:
            await self._answer(final_answer(failure))
            return True
        self.flow.response = self.flow.error = None
        return False

    async def _ask(self, failure: Failure) -> None:
        await self._addons.run(SollolFailureHook, failure)
        if self.client.left:
            raise ClientLeft

    # -- the node's answer ----------------------------------------------------------------------------

    async def _answered(self, upstream: Upstream, head: Awaitable[AnswerHead]) -> bool:
        """Pass on the node's answer; False where the request is to be sent once more."""
        flow = self.flow
        try:
            came = (await head).response
        except Lost as lost:
            return await self._failure("reset", str(lost))
        flow.response = came
        await self._hook(HttpResponseHeadersHook)
        response = flow.response
        if response is not came:  # a hook has failed, or wants another answer
            self.node.drop()
            await self._answer(response, seen=True)
            return True
        if response.stream:
            return await self._streamed(upstream, response)
        content = bytearray()
        try:
            while not upstream.ended:
                content += await upstream.payload()
        except Lost as lost:
            return await self._failure("reset", str(lost))
        response.data.content = bytes(content)
        response.data.timestamp_end = time()
        if response.status_code >= 400 and not flow.request.stream:
            text = response.get_text(strict=False) or ""
            failure = Failure(flow, "status", text, response.status_code)
            await self._ask(failure)
            if failure.retry or failure.response is not None:
                self.node.release()
                return await self._settled(failure)
        self.node.release()
        await self._finish(HttpResponseHook)
        self._write_whole(response)
        return True

    async def _streamed(self, upstream: Upstream, response: http.Response) -> bool:
        """Hold back what can still be replaced, then pass on what comes."""
        flow, held = self.flow, bytearray()
        if not flow.request.stream:
            try:
                verdict, detail = await self._judged(upstream, held)
            except Lost as lost:
                return await self._failure("reset", str(lost))
            if verdict in ("first_line", "empty"):
                return await self._failure(verdict, detail, 500)
        tee = response.stream
        assert isinstance(tee, relay.Tee)
        chunked = self._is_chunked(response, upstream)
        begin = answer_bytes(response, chunked=chunked, close=self._closes())
        out = tee(bytes(held)) or b"" if held else b""
        if not upstream.ended:
            if self.client.left:
                raise ClientLeft
            self._begun = True
            self.client.write(begin + (chunk(out) if chunked else out))
            splice = self.node.splice = Splice(upstream, self.client.transport.write, tee, chunked=chunked)
            self.node.hold(self.client.is_full)
            try:
                await splice.run()
            except Lost as lost:
                await self._cut(str(lost))
                return True
            begin = out = b""
        out += tee(b"") or b""
        self.node.release()
        response.data.timestamp_end = time()
        await self._finish(HttpResponseHook)
        self._begun = True
        self.client.write(begin + (chunk(out) + END if chunked else out))
        return True

    async def _judged(self, upstream: Upstream, held: bytearray) -> tuple[relay.Verdict, str]:
        while True:
            held += await upstream.payload()
            verdict, detail = relay.judge(self.flow, held, upstream.ended)
            if verdict != "wait":
                return verdict, detail

    def _is_chunked(self, response: http.Response, upstream: Upstream) -> bool:
        """Whether the client gets the body in chunks: where it has no length that is known."""
        if isinstance(upstream.follower, Length) and upstream.ended and not upstream.follower.total:
            return False  # the answer to a HEAD, a 204: its fields speak of another body
        if isinstance(upstream.follower, UntilClose):
            response.headers["transfer-encoding"] = "chunked"
        return first(response.headers, b"transfer-encoding") != ""

    async def _cut(self, reason: str) -> None:
        """The answer has broken off: end it in its own protocol, or else with its connection."""
        tail = relay.cut(self.flow, reason)
        self.node.drop()
        rec = record.of(self.flow)
        await self._broken((rec and rec.abort_reason) or reason)
        if tail is None:
            self._keep = False
        else:
            self.client.write(chunk(tail) + END)

    # -- uploads --------------------------------------------------------------------------------------

    async def _upload(self) -> None:
        """Pass on a body that is too large to hold, and the answer, which may come before its end."""
        upstream = await self._connected(fresh=True)
        if upstream is None:
            return
        request = self.flow.request
        upstream.send(request_bytes(request, self._head.length))
        async with Upload(self.client, upstream, request.method, chunked=self._head.length is None) as upload:
            if await upload.passed():
                request.data.timestamp_end = time()
                await self._hook(HttpRequestHook)
                if self.flow.response is not None:  # a hook has failed
                    self.node.drop()
                    await self._answer(self.flow.response)
                    return
                upload.end()
            await self._answered(upstream, upload.head)

    # -- answers of the proxy's own -------------------------------------------------------------------

    async def _answer(self, response: http.Response, seen: bool = False) -> None:
        """Send a whole answer. ``seen``: the ``responseheaders`` hooks have had their turn."""
        self.flow.response = response
        response.data.timestamp_start = response.data.timestamp_end = time()
        if not seen:
            await self._hook(HttpResponseHeadersHook)
        await self._finish(HttpResponseHook)
        self._write_whole(self.flow.response)

    def _write_whole(self, response: http.Response) -> None:
        content = response.raw_content or b""
        bare = self.flow.request.method == "HEAD" or response.status_code in (204, 304)
        self._begun = True
        begin = answer_bytes(response, close=self._closes(), length=None if bare else len(content))
        self.client.write(begin if bare else begin + content)

    async def _serve(self, stream: record.Stream) -> None:
        """Send an answer that comes piece by piece from ``stream``."""
        self.flow.response = stream.head
        stream.head.data.timestamp_start = time()
        await self._hook(HttpResponseHeadersHook)
        if self.flow.response is not stream.head:  # a hook has failed
            await self._answer(self.flow.response, seen=True)
            return
        self._begun = True
        self.client.write(answer_bytes(stream.head, chunked=True, close=self._closes()))
        while True:
            following = NextChunk(self.flow)
            await self._addons.run(SollolNextChunkHook, following)
            if self.client.left:
                raise ClientLeft
            if following.data is None:
                break
            self.client.write(chunk(following.data))
            await self.client.drained()
        stream.head.data.timestamp_end = time()
        await self._finish(HttpResponseHook)
        self.client.write(END)

    async def _refuse(self, bad: BadBody) -> None:
        rec = record.of(self.flow)
        protocol, request_id = (rec.protocol, rec.id) if rec is not None else ("native", "")
        if rec is not None:
            rec.outcome = "refused"
        await self._instead(errors.refused(protocol, bad.refusal, request_id))

    async def _failed(self, defect: Exception) -> None:
        """Something of ours has failed where no hook answers for it."""
        rec = record.of(self.flow)
        defects.report(defect, "stream", rec.id if rec is not None else "")
        if self._begun:
            await self._cut(errors.OWN_FAULT)
            return
        if rec is not None:
            rec.outcome = "failed"
        await self._instead(own_failure(self.flow))

    async def _instead(self, response: http.Response) -> None:
        """Give ``response``, if the client has seen nothing else; if it has, all that is left is to close."""
        self.node.drop()
        if self._begun or self._over:
            self._keep = False
            await self._broken("the answer could not be finished")
            return
        try:
            await self._answer(response)
        except ClientLeft:
            await self._broken(LEFT)

    # -- hooks ----------------------------------------------------------------------------------------

    async def _hook(self, event: type[hooks.Hook]) -> None:
        """Run the hooks of ``event`` on the flow. Raises ClientLeft if the client has gone meanwhile."""
        await self._addons.run(event, self.flow)
        if self.client.left:
            raise ClientLeft

    async def _finish(self, event: type[hooks.Hook]) -> None:
        """Run the last hooks, once."""
        if not self._over:
            self._over = True
            self.flow.live = False
            await self._addons.run(event, self.flow)

    async def _broken(self, reason: str) -> None:
        self.node.drop()
        self.flow.error = mitm_flow.Error(reason)
        await self._finish(HttpErrorHook)

    def _closes(self) -> bool:
        draining = self.client.front.draining
        if self.client.closing or draining or (self.client.is_sending and self._head.expects_continue):
            self._keep = False
        return not self._keep
