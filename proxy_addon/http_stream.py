"""One upstream attempt made replaceable: mitmproxy's HTTP layers with failover inside.

mitmproxy is sans-io; an :class:`HttpStream` is one request as a generator of commands. The subclass here adds
what a balancer needs and hooks alone cannot do: try another node before the client has seen a byte, answer
early without buffering the body, serve a stream made by the proxy itself, and end a stream that was cut in
the client's own protocol. It decides nothing: policy is asked through the hooks of
:mod:`proxy_addon.attempt`.

The overridden methods are private API, unchanged from mitmproxy 10.4 to 12.2; hence the pin in
``pyproject.toml``.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from time import time
from typing import Any
from weakref import WeakSet

from mitmproxy import flow as mitm_flow
from mitmproxy import http
from mitmproxy.connection import Server
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layers.http import (
    DropStream,
    GetHttpConnection,
    HttpErrorHook,
    HttpEvent,
    HttpResponseHeadersHook,
    HttpResponseHook,
    HttpStream,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
    SendHttp,
)
from mitmproxy.proxy.layers.http._base import HttpCommand

from proxy_addon import defects, errors, record, relay
from proxy_addon.attempt import (
    Failure,
    NextChunk,
    SollolFailureHook,
    SollolNextChunkHook,
    final_answer,
    own_failure,
)

Commands = Generator[commands.Command, Any, None]

#: A refused upload is read on, so that the client gets to see the answer instead of a reset, up to here
#: (nginx: ``lingering_close``).
DISCARD_LIMIT_BYTES = 256 << 20


@dataclass
class ForgetUpstream(HttpCommand):
    """Tells the layer above to drop an upstream connection and its state machine."""

    connection: Server


class FleetStream(HttpStream):
    """An HTTP stream whose upstream attempt can be replaced until the client has seen a byte."""

    _reused = False
    _answered = False  # the proxy has answered, whatever the upload still brings
    _discarded_bytes = 0
    _kept = b""  # the end of a streamed answer, until the last hook has had its turn

    def __init__(self, context: Any, stream_id: int) -> None:
        super().__init__(context, stream_id)
        self._held = bytearray()

    def _handle_event(self, event: events.Event) -> Commands:
        """As the parent; a defect in it or in what it calls ends this request, not the connection."""
        try:
            yield from super()._handle_event(event)
        except Exception as defect:  # noqa: BLE001 - the outermost boundary of a stream
            yield from self._failed(defect)

    # -- before the request is complete ---------------------------------------------------------------

    def state_wait_for_request_headers(self, event: RequestHeaders) -> Commands:
        """As the parent, but an answer set in ``requestheaders`` goes out now, the body is discarded."""
        yield from super().state_wait_for_request_headers(event)
        if self._answered:  # an upload whose node could not be reached
            self.server_state = self.state_done
        elif self.client_state == self.state_consume_request_body and self.flow.response is not None:
            yield from self._answer(self.flow.response)

    def start_request_stream(self) -> Commands:
        """As the parent, but a node that cannot be reached is answered for instead of dropped."""
        if not (yield from self.make_server_connection()):
            return
        head = RequestHeaders(self.stream_id, self.flow.request, end_stream=False)
        yield SendHttp(head, self.context.server)
        self.client_state = self.state_stream_request_body

    def state_consume_request_body(self, event: events.Event) -> Commands:
        """As the parent, but a body that outgrows what it may take is answered at once."""
        if isinstance(event, RequestData):
            rec = record.of(self.flow)
            refusal = rec.held.grow(len(event.data)) if rec is not None and rec.held is not None else None
            if rec is not None and refusal is not None:
                self.request_body_buf.clear()
                rec.outcome = "refused"
                return (yield from self._answer(errors.refused(rec.protocol, refusal, rec.id)))
        yield from super().state_consume_request_body(event)

    def state_stream_request_body(self, event: HttpEvent) -> Commands:
        """As the parent, but an answer that a hook has set in the end goes out in place of the node's."""
        unanswered = self.flow.response is None
        yield from super().state_stream_request_body(event)
        waits = unanswered and self.server_state == self.state_wait_for_response_headers
        if waits and self.flow.response is not None:
            yield ForgetUpstream(self.context.server)
            yield from self._answer(self.flow.response)

    def state_discard(self, event: HttpEvent) -> Commands:
        """The request was answered: read the rest of its body away, then the connection is free again."""
        if isinstance(event, RequestData):
            self._discarded_bytes += len(event.data)
            if self._discarded_bytes > DISCARD_LIMIT_BYTES:
                yield commands.CloseConnection(self.context.client)
        elif isinstance(event, RequestEndOfMessage):
            self.client_state = self.state_done
            yield from self.flow_done()

    # -- answers made here ----------------------------------------------------------------------------

    def _answer(self, response: http.Response, seen: bool = False) -> Commands:
        """Send a complete response of the proxy's own, whether or not the request's body has come.

        ``seen``: the ``responseheaders`` hooks have had their turn.
        """
        self._answered = True
        self.flow.response = response
        response.timestamp_start = response.timestamp_end = time()
        if not seen:
            yield HttpResponseHeadersHook(self.flow)
        yield HttpResponseHook(self.flow)
        self.server_state = self.state_done
        self._forget_late_words()
        if (yield from self.check_killed(False)):
            return
        response = self.flow.response or response  # a hook that failed has put another in its place
        content = response.raw_content
        yield SendHttp(ResponseHeaders(self.stream_id, response, not content), self.context.client)
        if content:
            yield SendHttp(ResponseData(self.stream_id, content), self.context.client)
        if self.client_state == self.state_done:
            yield from self.flow_done()
        else:
            self.client_state = self.state_discard

    def _serve(self, stream: record.Stream) -> Commands:
        """Send an answer that comes piece by piece from ``stream``."""
        rec = record.of(self.flow)
        self.flow.response = stream.head
        stream.head.timestamp_start = time()
        yield HttpResponseHeadersHook(self.flow)
        if self.flow.response is not stream.head:
            return (yield from self._answer(self.flow.response, seen=True))
        self.server_state = self.state_done
        yield SendHttp(ResponseHeaders(self.stream_id, stream.head, False), self.context.client)
        while True:
            chunk = NextChunk(self.flow)
            yield SollolNextChunkHook(chunk)
            if rec is not None and rec.left:
                self.flow.error = mitm_flow.Error("client disconnected")
                yield HttpErrorHook(self.flow)
                self.client_state = self.state_errored
                self.flow.live = False
                yield DropStream(self.stream_id)
                return
            if chunk.data is None:
                break
            if chunk.data:
                yield SendHttp(ResponseData(self.stream_id, chunk.data), self.context.client)
        stream.head.timestamp_end = time()
        yield HttpResponseHook(self.flow)
        yield from self.flow_done()

    # -- attempts -------------------------------------------------------------------------------------

    def make_server_connection(self) -> Generator[commands.Command, Any, bool]:
        """Connect to the chosen node, or to the next one; an answer of the proxy's own needs none."""
        rec = record.of(self.flow)
        if rec is not None and rec.stream is not None:
            yield from self._serve(rec.stream)
            return False
        if rec is None or not rec.placed:
            # A hook failed and mitmproxy logged it: without a placement the request must go nowhere.
            yield from self._answer(own_failure(self.flow))
            return False
        while True:
            conn, err = yield GetHttpConnection(
                (self.flow.request.host, self.flow.request.port),
                self.flow.request.scheme == "https",
                self.flow.server_conn.via,
                self.flow.server_conn.transport_protocol,
            )
            if (yield from self.check_killed(True)):
                return False
            if err is None:
                self._reused = conn in _USED
                _USED.add(conn)
                self.context.server = self.flow.server_conn = conn
                return True
            failure = Failure(self.flow, "connect", err)
            if not (yield from self._ask(failure)):
                return False
            if not failure.retry:
                yield from self._answer(final_answer(failure))
                return False

    def _forget_late_words(self) -> None:
        """Drop what a forgotten upstream had said, which waits its turn while a hook takes its time."""
        waiting = self._paused_event_queue
        still = [event for event in waiting if not isinstance(event, _FROM_UPSTREAM)]
        waiting.clear()
        waiting.extend(still)

    def _ask(self, failure: Failure) -> Generator[commands.Command, Any, bool]:
        """Ask the policy about ``failure``. Returns False if the client has left meanwhile."""
        yield SollolFailureHook(failure)
        return not (yield from self.check_killed(True))

    def _settle(self, failure: Failure) -> Commands:
        """Do what the policy said: send the request to the node it chose, or give its answer."""
        self._held.clear()
        self.response_body_buf.clear()
        if not failure.retry:
            yield from self._answer(final_answer(failure))
            return
        self.flow.response = self.flow.error = None
        self.server_state = self.state_wait_for_response_headers
        if not (yield from self.make_server_connection()):
            return
        self._forget_late_words()
        content = self.flow.request.raw_content
        yield SendHttp(RequestHeaders(self.stream_id, self.flow.request, not content), self.context.server)
        if content:
            yield SendHttp(RequestData(self.stream_id, content), self.context.server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), self.context.server)

    # -- the response ---------------------------------------------------------------------------------

    def state_wait_for_response_headers(self, event: ResponseHeaders) -> Commands:
        """As the parent, but a response that a hook put in the place of the node's goes out as it is."""
        yield from super().state_wait_for_response_headers(event)
        answer = self.flow.response
        begun = self.server_state in (self.state_consume_response_body, self.state_hold)
        if begun and answer is not None and answer is not event.response:
            yield ForgetUpstream(self.context.server)
            yield from self._answer(answer, seen=True)

    def start_response_stream(self) -> Commands:
        """Hold the head back until the body shows that the attempt is good."""
        if self._replayable_request():
            self.server_state = self.state_hold
        else:
            yield from super().start_response_stream()

    def state_hold(self, event: HttpEvent) -> Commands:
        """A response has begun: judge its first bytes, then let it through or replace it."""
        ended = isinstance(event, ResponseEndOfMessage)
        if isinstance(event, ResponseData):
            self._held += event.data
        verdict, detail = relay.judge(self.flow, self._held, ended)
        if verdict == "wait":
            return
        if verdict == "release":
            held = bytes(self._held)
            self._held.clear()
            yield from super().start_response_stream()
            if held:
                yield from self.server_state(ResponseData(self.stream_id, held))
            if ended:
                yield from self.server_state(event)
            return
        yield ForgetUpstream(self.context.server)
        failure = Failure(self.flow, verdict, detail, status=500)
        if (yield from self._ask(failure)):
            yield from self._settle(failure)

    def state_stream_response_body(self, event: events.Event) -> Commands:
        """As the parent, but what the tee has kept for the end goes out behind the last hook."""
        response = self.flow.response
        if isinstance(event, ResponseEndOfMessage) and response and isinstance(response.stream, relay.Tee):
            self._kept = response.stream(b"") or b""
            yield from self.send_response(already_streamed=True)
        else:
            yield from super().state_stream_response_body(event)

    def flow_done(self) -> Commands:
        """As the parent, behind what was kept for the end."""
        if self._kept:
            yield SendHttp(ResponseData(self.stream_id, self._kept), self.context.client)
            self._kept = b""
        yield from super().flow_done()

    def send_response(self, already_streamed: bool = False) -> Commands:
        """As the parent, but a node's complete error or empty answer is first shown to the policy."""
        mine = self.server_state == self.state_consume_response_body and self._replayable_request()
        failure = self._failed_whole() if mine and not already_streamed else None
        if failure is not None:
            if not (yield from self._ask(failure)):
                return
            if failure.retry or failure.response is not None:
                yield from self._settle(failure)
                return
        yield from super().send_response(already_streamed)

    def _failed_whole(self) -> Failure | None:
        """What the policy should know of a complete answer that was not streamed."""
        response = self.flow.response
        assert response
        if response.status_code >= 400:
            return Failure(self.flow, "status", response.get_text(strict=False) or "", response.status_code)
        verdict, detail = relay.judge(self.flow, response.raw_content or b"", ended=True)
        if verdict == "first_line" or verdict == "empty":
            return Failure(self.flow, verdict, detail, status=500)
        return None

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> Commands:
        """A node that dies: try another, or end the answer so that the client can tell."""
        if isinstance(event, ResponseProtocolError) and self.client_state != self.state_errored:
            if self.server_state in (
                self.state_wait_for_response_headers,
                self.state_consume_response_body,
                self.state_hold,
            ):
                yield ForgetUpstream(self.context.server)
                replayable = self._replayable_request()
                failure = Failure(
                    self.flow, "reset", event.message, reused=self._reused, replayable=replayable
                )
                if (yield from self._ask(failure)):
                    yield from self._settle(failure)
                return
            if self.server_state == self.state_stream_response_body and self.client_state == self.state_done:
                tail = relay.cut(self.flow, event.message)
                if tail is not None:
                    yield from self._end_cut_stream(event.message, tail)
                    return
        yield from super().handle_protocol_error(event)

    def _failed(self, defect: Exception) -> Commands:
        """Answer for a defect; where the answer has begun, cut it so that the client can tell."""
        rec = record.of(self.flow)
        defects.report(defect, "stream", rec.id if rec else "")
        yield ForgetUpstream(self.context.server)
        self._held.clear()
        if not self._answered and self.server_state not in (self.state_stream_response_body, self.state_done):
            if rec is not None:
                rec.outcome = "failed"
            yield from self._answer(own_failure(self.flow))
            return
        tail = relay.cut(self.flow, errors.OWN_FAULT)
        if tail is not None:
            yield from self._end_cut_stream(errors.OWN_FAULT, tail)
            return
        self.flow.error = mitm_flow.Error(errors.OWN_FAULT)
        yield HttpErrorHook(self.flow)
        self.server_state, self.client_state = self.state_done, self.state_errored
        self.flow.live = False
        yield commands.CloseConnection(self.context.client)

    def _replayable_request(self) -> bool:
        """Whether the whole request is at hand, so that it can be sent once more."""
        return self.client_state == self.state_done and not self.flow.request.stream

    def _end_cut_stream(self, reason: str, tail: bytes) -> Commands:
        """Append ``tail`` to an answer that broke off and end it well-framed."""
        yield ForgetUpstream(self.context.server)
        rec = record.of(self.flow)
        self.flow.error = mitm_flow.Error((rec and rec.abort_reason) or reason)
        yield HttpErrorHook(self.flow)
        self.server_state = self.state_done
        self.flow.live = False
        if tail:
            yield SendHttp(ResponseData(self.stream_id, tail), self.context.client)
        yield DropStream(self.stream_id)
        yield SendHttp(ResponseEndOfMessage(self.stream_id), self.context.client)

    def handle_event(self, event: events.Event) -> Commands:
        """As the parent, but whoever waits in a hook for this client's sake is told at once that it left."""
        if self._paused and isinstance(event, RequestProtocolError):
            rec = record.of(self.flow)
            if rec is not None:
                rec.client_left()
        yield from super().handle_event(event)


_FROM_UPSTREAM = (
    ResponseHeaders,
    ResponseData,
    ResponseTrailers,
    ResponseEndOfMessage,
    ResponseProtocolError,
)

#: Upstream connections that have carried a request: a reset on one of them says nothing about the node,
#: which may just have closed an idle connection.
_USED: WeakSet[Server] = WeakSet()
