"""What holds for any bytes at all: each target takes some and raises if ours and others' parsers disagree.

Hypothesis, the kept corpus (``test_corpus.py``) and the coverage-guided run (``make fuzz``) all feed these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import h11
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from mitmproxy.net.http import http1
from mitmproxy.net.http.validate import validate_headers

from proxy_addon.lane.framing import Chunked, FramingError
from proxy_addon.lane.head import END, read_answer, read_request


@dataclass(frozen=True)
class Body:
    """A body as a follower has understood it."""

    payload: bytes
    ended: bool
    rest: bytes


def split(data: bytes) -> tuple[bytes, list[int]]:
    """Fuzzers give one string of bytes: its last ones say where the others are cut."""
    if not data:
        return data, []
    count = min(data[-1] % 8, len(data) - 1)
    body = data[: len(data) - 1 - count]
    return body, sorted(at % (len(body) + 1) for at in data[len(body) : -1])


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """``data`` cut at ``cuts``."""
    at, found = 0, []
    for cut in [*cuts, len(data)]:
        found.append(data[at:cut])
        at = cut
    return [piece for piece in found if piece]


def followed(parts: Iterable[bytes]) -> Body | None:
    """What our follower makes of it; None if it refuses."""
    follower, payload, behind = Chunked(), b"", b""
    for part in parts:
        if follower.ended:
            behind += part
            continue
        try:
            payload += follower.feed(part)
        except FramingError:
            return None
    return Body(payload, follower.ended, follower.rest + behind)


def spliced(parts: Iterable[bytes]) -> Body | None:
    """The same by way of the short cut: whole chunks are not fed but passed on as they are."""
    follower, payload, held, behind = Chunked(), b"", b"", b""
    for part in parts:
        if follower.ended:
            behind += part
            continue
        if follower.between:
            part, held = held + part, b""
            whole = follower.whole(part)
            passed = followed([part[:whole]])
            assert passed is not None and not passed.ended and not passed.rest
            payload, part = payload + passed.payload, part[whole:]
            if follower.awaits(part):
                held = part
                continue
            if not part:
                continue
        try:
            payload += follower.feed(part)
        except FramingError:
            return None
    try:
        payload += follower.feed(held)  # of a chunk that has not come to its end
    except FramingError:
        return None
    return Body(payload, follower.ended, follower.rest + behind)


def of_h11(data: bytes) -> Body | None:
    """What h11 makes of it; None if it refuses."""
    reader, buffer, payload = ChunkedReader(), ReceiveBuffer(), b""
    buffer += data
    try:
        while (event := reader(buffer)) is not None:
            if isinstance(event, h11.EndOfMessage):
                return Body(payload, True, bytes(buffer))
            payload += bytes(event.data)
    except h11.LocalProtocolError:  # its reader's own; a connection makes a RemoteProtocolError of it
        return None
    return Body(payload, False, b"")


#: RFC 9112 §7.1.1 lets blanks stand there, h11 does not.
_SPACE_BEFORE_EXTENSION = re.compile(rb"[0-9A-Fa-f][ \t]+;")


def chunks(data: bytes) -> None:
    """A chunked body: however it is cut, the same; and where it ends, h11 says the same."""
    body, cuts = split(data)
    whole = followed([body])
    in_pieces = pieces(body, cuts)
    for found in (followed(in_pieces), spliced(in_pieces)):
        if whole is None or found is None:
            # What is wrong in the last piece may be seen a piece later, never an end instead of it.
            assert not (whole and whole.ended) and not (found and found.ended), (body, cuts)
        else:
            assert found == whole, (body, cuts)
    if whole is not None and whole.ended and not _SPACE_BEFORE_EXTENSION.search(body):
        assert whole == of_h11(body), body


def heads(data: bytes) -> None:
    """A request's head: what ours takes, mitmproxy and h11 take as well, and understand alike."""
    end = data.find(END)
    if end < 0:
        return
    head = data[: end + 4]
    ours = read_request(head)
    if ours is None:
        return
    theirs = http1.read_request_head(head.removesuffix(END).split(b"\r\n"))
    validate_headers(theirs)
    request = ours.request
    assert (request.method, request.path) == (theirs.method, theirs.path), head
    assert request.headers.fields == theirs.headers.fields, head
    assert http1.expected_http_body_size(theirs) == ours.length, head
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(head)
    event = connection.next_event()
    assert isinstance(event, h11.Request), head
    assert (event.method, event.target) == (request.data.method, request.data.path), head
    if ours.length:
        assert connection.their_state is h11.SEND_BODY, head


def answers(data: bytes) -> None:
    """An answer's head: it is read as mitmproxy reads it, or refused with a ValueError."""
    end = data.find(END)
    if end < 0:
        return
    head = data[: end + 4]
    try:
        ours = read_answer(head, "POST").response
    except ValueError:
        return
    theirs = http1.read_response_head(head.removesuffix(END).split(b"\r\n"))
    assert (ours.status_code, ours.headers.fields) == (theirs.status_code, theirs.headers.fields), head


TARGETS: dict[str, Callable[[bytes], None]] = {"chunks": chunks, "heads": heads, "answers": answers}
