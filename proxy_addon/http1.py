"""What mitmproxy's HTTP/1 layers do otherwise, changed in place.

Trailers of chunked bodies are dropped, as RFC 9110 §6.5.1 allows: mitmproxy raises on them and hangs. And
what it refuses before an addon sees it (a broken head, smuggling attempts) gets an error that an API client
can read instead of an HTML page. Clients are served by :class:`StrictServer`, and the head of a node's answer
has a limit too.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import h11
from mitmproxy import http
from mitmproxy.net.http import http1
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layers import http as http_layers
from mitmproxy.proxy.layers.http import ReceiveHttp, ResponseProtocolError, _http1
from mitmproxy.proxy.layers.http._events import ErrorCode

from proxy_addon import access, errors
from proxy_addon.lane.framing import SHRED_BYTES, SHREDS
from proxy_addon.lane.upstream import LONGEST_HEAD
from proxy_addon.strict_server import StrictServer

LONGEST_LINE_BYTES = 16 << 10  #: of a chunk's size with its extensions, and of all trailers
LARGEST_CHUNK_BYTES = 1 << 60  #: an exabyte: larger numbers are wrapped round by others


class _WithoutTrailers:
    """A body reader whose end carries no trailers."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._chunks = self._chunked_bytes = 0

    def __call__(self, buffer: Any) -> Any:
        event = self._reader(buffer)
        if event is None and len(buffer) > LONGEST_LINE_BYTES:  # it waits for the end of a line
            raise h11.RemoteProtocolError("the size of a chunk, or the trailers, are too long")
        if isinstance(event, h11.Data):
            self._chunks += 1
            self._chunked_bytes += len(event.data)
            if self._chunks == SHREDS and self._chunked_bytes < SHREDS * SHRED_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many too small chunks")
        if self._reader._bytes_in_chunk > LARGEST_CHUNK_BYTES:
            raise h11.RemoteProtocolError("a chunk is larger than any body")
        return self._bare(event)

    def read_eof(self) -> Any:
        return self._bare(self._reader.read_eof())

    @staticmethod
    def _bare(event: Any) -> Any:
        return h11.EndOfMessage() if isinstance(event, h11.EndOfMessage) and event.headers else event


class BoundedClient(_http1.Http1Client):
    """A connection to a node, whose heads are not read without end."""

    def read_headers(self, event: events.ConnectionEvent) -> Generator[commands.Command, Any, None]:
        """As the parent, but a head that is too long is none."""
        yield from super().read_headers(event)
        if self.state == self.read_headers and len(self.buf) > LONGEST_HEAD and self.stream_id is not None:
            yield commands.CloseConnection(self.conn)
            too_long = "the answer's head is too long"
            yield ReceiveHttp(ResponseProtocolError(self.stream_id, too_long, ErrorCode.GENERIC_SERVER_ERROR))


def _error_response(status_code: int, message: str = "") -> bytes:
    """The bytes of an error for a request whose path, hence protocol, may be unknown: Ollama's shape."""
    if " HTTP CONNECT " in message:
        status_code, message = 403, access.NO_TUNNELS
    sentence = message.partition(" Disable the ")[0].rstrip(".") or "the request cannot be understood"
    answer: http.Response = errors.response("native", status_code, sentence, headers={"connection": "close"})
    return bytes(http1.assemble_response(answer))


_parent_body_reader = _http1.make_body_reader


def _body_reader(expected_size: int | None) -> Any:
    reader = _parent_body_reader(expected_size)
    return _WithoutTrailers(reader) if expected_size is None else reader


def mend() -> None:
    """Make the changes; harmless the second time."""
    _http1.make_body_reader = _body_reader
    _http1.make_error_response = _error_response
    http_layers.Http1Server = StrictServer  # type: ignore[misc]
    http_layers.Http1Client = BoundedClient  # type: ignore[misc]
