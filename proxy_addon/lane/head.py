"""Heads of requests and answers, read strictly. Pure.

:func:`read_request` knows the plain heads that clients send, and says None to everything else: that is
mitmproxy's to judge (and mostly to refuse). So whatever is taken here means the same to every parser behind.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from mitmproxy import http
from mitmproxy.net.http import http1
from mitmproxy.net.http.validate import validate_headers

from proxy_addon.heads import first
from proxy_addon.lane.framing import Chunked, Follower, Length, UntilClose
from proxy_addon.strict_head import FIELDS

END = b"\r\n\r\n"

_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"OPTIONS ")
_REQUEST_LINE = re.compile(rb"(?=%b)([A-Z]+) (/[\x21-\x7e]*) HTTP/1\.1\r\n" % b"|".join(_METHODS))
_STATUS_LINE = re.compile(rb"(HTTP/1\.[01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n")
_NUMBER = re.compile(rb"(?:0|[1-9][0-9]{0,17})\Z")

#: Of one connection, not of the message (RFC 9110 §7.6.1), and of a framing that is made anew.
NOT_PASSED_ON = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade",
        b"transfer-encoding", b"content-length", b"expect",
    )
)  # fmt: skip

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(slots=True)
class RequestHead:
    """A request's head. ``length`` is None for a chunked body, 0 for none."""

    request: http.Request
    length: int | None
    keep_alive: bool
    expects_continue: bool


@dataclass(slots=True)
class AnswerHead:
    """An answer's head, how its body ends, and whether its connection can be used again after it."""

    response: http.Response
    follower: Follower
    keep_alive: bool


def may_become_plain(begun: bytes) -> bool:
    """Whether :func:`read_request` may yet know a head that begins with ``begun``."""
    if b"\n\n" in begun or b"\n\r\n" in begun:
        return False  # an empty line has come, but not as it should
    return any(begun.startswith(method) or method.startswith(begun) for method in _METHODS)


def read_request(head: bytes) -> RequestHead | None:
    """The request whose head, with the empty line behind it, is ``head``; None for any but a plain one."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        return None
    read = _fields(head, line.end())
    if read is None:
        return None
    fields, special = read
    if b"upgrade" in special or b"host" not in special:
        return None
    length: int | None = 0
    coding, announced = special.get(b"transfer-encoding"), special.get(b"content-length")
    if coding is not None:
        if announced is not None or coding.lower() != b"chunked":
            return None
        length = None
    elif announced is not None:
        if not _NUMBER.match(announced):
            return None
        length = int(announced)
    expected = special.get(b"expect")
    if expected is not None and expected.lower() != b"100-continue":
        return None
    method, path = line[1], line[2]
    request = _new(http.Request)
    request.data = http.RequestData(
        b"HTTP/1.1", _headers(fields), None, None, time.time(), None, "", 0, method, b"", b"", path
    )
    connection = special.get(b"connection", b"").lower()
    return RequestHead(request, length, b"close" not in connection, expected is not None)


#: Fields of which a message has one at most; a second one is for a stricter judge.
_ONCE = frozenset((b"transfer-encoding", b"content-length", b"host", b"expect", b"connection", b"upgrade"))


def _fields(head: bytes, at: int) -> tuple[Fields, dict[bytes, bytes]] | None:
    """The fields from ``at`` on, and those of :data:`_ONCE` by lower-case name; None if not plain."""
    if not FIELDS.fullmatch(head, at):
        return None
    fields: list[tuple[bytes, bytes]] = []
    special: dict[bytes, bytes] = {}
    for line in head[at:-4].split(b"\r\n") if at < len(head) - 2 else ():
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        fields.append((name, value))
        lower = name.lower()
        if lower in _ONCE:
            if lower in special:
                return None
            special[lower] = value
    return tuple(fields), special


def read_answer(head: bytes, method: str) -> AnswerHead:
    """The answer to a request of ``method`` whose head is ``head``.

    Raises:
        ValueError: it is none that may be passed on.
    """
    line = _STATUS_LINE.match(head)
    read = _fields(head, line.end()) if line is not None else None
    if line is None or read is None:
        return _read_unusual_answer(head, method)
    fields, special = read
    status = int(line[2])
    coding, announced = special.get(b"transfer-encoding"), special.get(b"content-length")
    follower: Follower
    if method == "HEAD" or status < 200 or status in (204, 304):
        follower = Length(0)
    elif coding is not None:
        if announced is not None or coding.lower() != b"chunked" or line[1] != b"HTTP/1.1":
            return _read_unusual_answer(head, method)
        follower = Chunked()
    elif announced is not None:
        if not _NUMBER.match(announced):
            return _read_unusual_answer(head, method)
        follower = Length(int(announced))
    else:
        follower = UntilClose()
    response = _new(http.Response)
    response.data = http.ResponseData(
        line[1], _headers(fields), None, None, time.time(), None, status, line[3] or b""
    )
    connection = special.get(b"connection", b"").lower()
    stays = b"close" not in connection and (line[1] == b"HTTP/1.1" or b"keep-alive" in connection)
    return AnswerHead(response, follower, stays)


_new = object.__new__  # their own constructors convert and check what here is known: a third of the whole


def _headers(fields: Fields) -> http.Headers:
    headers = _new(http.Headers)
    headers.fields = fields
    return headers


def _read_unusual_answer(head: bytes, method: str) -> AnswerHead:
    """As :func:`read_answer`, by mitmproxy's parser and checks."""
    response = http1.read_response_head(head.removesuffix(END).split(b"\r\n"))
    validate_headers(response)
    asked = http.Request.make(method, "http://node/")
    size = http1.expected_http_body_size(asked, response)
    follower = Chunked() if size is None else UntilClose() if size < 0 else Length(size)
    return AnswerHead(response, follower, keep_alive=False)


def request_bytes(request: http.Request, length: int | None) -> bytes:
    """The head of ``request`` for a node, with a body of ``length`` bytes, or in chunks if that is None."""
    data = request.data
    framing = b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length
    if not length and data.method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE"):
        framing = b""
    return b"%b %b HTTP/1.1\r\n%b%b\r\n" % (data.method, data.path, _passed_on(data.headers.fields), framing)


def answer_bytes(
    response: http.Response, *, close: bool, chunked: bool = False, length: int | None = None
) -> bytes:
    """The head of ``response`` for the client, with its framing and the fate of the connection.

    ``length`` is the body's; None leaves what the head announces.
    """
    data = response.data
    if chunked:
        framing = b"transfer-encoding: chunked\r\n"
    else:
        announced = first(data.headers, b"content-length") if length is None else str(length)
        framing = b"content-length: %b\r\n" % announced.encode() if announced else b""
    if close:
        framing += b"connection: close\r\n"
    fields = _passed_on(data.headers.fields)
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n" % (data.status_code, data.reason, fields, framing)


def _passed_on(fields: Fields) -> bytes:
    """The lines of ``fields`` but those that speak of the connection or of the framing."""
    kept = []
    named: tuple[bytes, ...] = ()
    for name, value in fields:
        lower = name.lower()
        if lower not in NOT_PASSED_ON:
            kept.append((lower, b"%b: %b\r\n" % (name, value)))
        elif lower == b"connection":
            named += tuple(part.strip() for part in value.lower().split(b","))
    return b"".join(
        [line for lower, line in kept if lower not in named] if named else [line for _, line in kept]
    )
