"""The followers of bodies and the readers of heads against those of h11 and mitmproxy, on any bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy_addon.lane.framing import Length
from proxy_addon.lane.head import read_request
from tests.fuzz import targets

payloads = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
cuts = st.binary(max_size=7)
extensions = st.sampled_from([b"", b";a", b";a=b", b' ; q="x;y"', b"\t;x"])
trailers = st.sampled_from([b"", b"X: y\r\n", b"Expires: never\r\nA-B:\r\n"])


def fuzzed(body: bytes, at: bytes) -> bytes:
    """Bytes for a target: the body, and where it is cut."""
    return body + at + bytes([len(at)])


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A well-formed body, and its payload."""
    parts = draw(payloads)
    ext = draw(extensions)
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(part), ext, part) for part in parts)
    return framed + b"0\r\n" + draw(trailers) + b"\r\n", b"".join(parts)


@given(chunked(), cuts, st.binary(max_size=20))
def test_a_body_in_chunks_is_its_payload_however_it_is_cut(
    body: tuple[bytes, bytes], at: bytes, behind: bytes
) -> None:
    framed, payload = body
    targets.chunks(fuzzed(framed + behind, at))
    assert targets.followed([framed + behind]) == targets.Body(payload, True, behind)


@given(chunked(), cuts, st.data())
def test_a_damaged_body_ends_where_h11_sees_its_end(
    body: tuple[bytes, bytes], at: bytes, data: st.DataObject
) -> None:
    framed = bytearray(body[0])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(framed) - 1))
        framed[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"f", b";", b" ", b"\x00", b"\xff", b"-"])
        )
    targets.chunks(fuzzed(bytes(framed), at))


@given(st.binary(max_size=200), cuts)
def test_any_bytes_are_a_body_or_none(data: bytes, at: bytes) -> None:
    targets.chunks(fuzzed(data, at))


@given(st.binary(max_size=100), st.integers(0, 120), cuts)
def test_a_length_is_kept_however_the_body_is_cut(data: bytes, length: int, at: bytes) -> None:
    follower, payload, behind = Length(length), b"", b""
    for piece in targets.pieces(data, sorted(cut % (len(data) + 1) for cut in at)):
        if follower.ended:
            behind += piece
        else:
            payload += follower.feed(piece)
    assert payload == data[:length]
    assert follower.ended == (len(data) >= length)
    assert follower.rest + behind == data[length:]


tokens = st.sampled_from(
    [b"Host", b"host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect", b"X-A", b"Upgrade"]
)
values = st.one_of(
    st.sampled_from(
        [b"localhost", b"0", b"5", b"+5", b"5, 5", b"05", b"chunked", b"Chunked", b"gzip, chunked", b"close",
         b"keep-alive", b"100-continue", b"", b" ", b"h2c", b"\xff", b"a\tb", b"18446744073709551616"]
    ),
    st.binary(max_size=12),
)  # fmt: skip
spaces = st.sampled_from([b": ", b":", b":\t", b" : ", b":  "])
ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n "])


@st.composite
def request_heads(draw: st.DrawFn) -> bytes:
    """Heads that are nearly right."""
    line = draw(st.sampled_from([b"GET", b"POST", b"PUT", b"get", b"CONNECT", b"HEAD", b"OPTIONS"]))
    path = draw(st.sampled_from([b"/", b"/a?b#c", b"http://h/", b"*", b"/ x", b"/\xe4", b"//h/a"]))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.1 "]))
    fields = draw(st.lists(st.tuples(tokens, spaces, values, ends), max_size=5))
    host = draw(st.sampled_from([b"Host: localhost\r\n"] * 3 + [b""]))
    return b"%b %b %b\r\n%b" % (line, path, version, host) + b"".join(b"".join(f) for f in fields) + b"\r\n"


@given(request_heads())
def test_a_head_that_is_taken_means_the_same_to_others(head: bytes) -> None:
    targets.heads(head)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_none(data: bytes) -> None:
    targets.heads(data + b"\r\n\r\n")
    targets.answers(data + b"\r\n\r\n")
    targets.answers(b"HTTP/1.1 200 OK\r\n" + data + b"\r\n\r\n")


@given(st.lists(st.tuples(tokens, spaces, values, ends), max_size=6), st.integers(100, 599))
def test_an_answers_head_is_read_as_mitmproxy_reads_it(fields: list[tuple[bytes, ...]], status: int) -> None:
    targets.answers(b"HTTP/1.1 %d OK\r\n%b\r\n" % (status, b"".join(b"".join(field) for field in fields)))


def test_plain_heads_are_taken() -> None:
    """What the properties above say of heads that are taken must not be true for want of any."""
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    assert read_request(head) is not None
    targets.heads(head)
