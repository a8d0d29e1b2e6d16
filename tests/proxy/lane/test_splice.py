"""Whatever pieces an answer comes in, its client gets the same bytes, and half a line never."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_addon import relay
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.lane.framing import END, Chunked, chunk
from proxy_addon.lane.splice import Splice
from proxy_addon.lane.upstream import ClientLeft, Lost
from proxy_addon.record import Record

LINES = st.lists(st.text(max_size=20).map(lambda text: orjson.dumps({"response": text}) + b"\n"), max_size=12)
DONE = b'{"done":true,"eval_count":3}\n'
CUTS = st.lists(st.integers(0, 600), max_size=12)


class Wire:
    """Stands in the place of both connections."""

    def __init__(self) -> None:
        self.follower = Chunked()
        self.sink: Any = None
        self.sent = b""

    def relay(self, sink: Any) -> bytes:
        self.sink = sink
        return b""

    def write(self, data: bytes) -> None:
        assert data, "an empty send would be one for nothing"
        self.sent += data


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place for place in places if place < len(data))})
    return [data[a:b] for a, b in pairwise(marks)]


def splice() -> tuple[Wire, Splice, relay.Tee]:
    endpoint = match("/api/generate")
    assert endpoint
    rec = Record("id", "native", 0.0, "127.0.0.1", endpoint, Ask(endpoint, stream=True))
    tee = relay.Tee(rec, "ndjson", lambda: 1.0)
    wire = Wire()
    made = Splice(wire, wire.write, tee, chunked=True)  # type: ignore[arg-type]
    return wire, made, tee


@given(LINES, CUTS, CUTS)
async def test_a_body_arrives_as_it_was_sent(lines: list[bytes], chunks: list[int], reads: list[int]) -> None:
    wire, spliced, tee = splice()
    body = b"".join([*lines, DONE])
    for piece in cut(b"".join(map(chunk, cut(body, chunks))) + END, reads):
        spliced.data(piece)
    await spliced.run()
    follower = Chunked()
    assert follower.feed(wire.sent + chunk(tee(b"") or b"") + END) == body
    assert follower.ended
    assert tee._rec.stats is not None
    assert tee._rec.stats.output_tokens == 3


@given(LINES, CUTS, CUTS, st.integers(0, 600))
async def test_what_breaks_off_leaves_whole_chunks_of_whole_lines(
    lines: list[bytes], chunks: list[int], reads: list[int], end: int
) -> None:
    wire, spliced, _ = splice()
    body = b"".join([*lines, DONE])
    sent = b"".join(map(chunk, cut(body, chunks)))[:end]
    for piece in cut(sent, reads):
        spliced.data(piece)
    spliced.lost("the node closed the connection", clean=True)
    with pytest.raises(Lost, match="before the last chunk"):
        await spliced.run()
    follower = Chunked()
    seen = follower.feed(wire.sent)
    assert follower.between
    assert body.startswith(seen)
    assert not seen or seen.endswith(b"\n")


async def test_whole_chunks_go_out_as_they_came_with_the_extensions_that_they_had() -> None:
    wire, spliced, _ = splice()
    spliced.data(b'9;a=b\r\n{"a":12}\n\r\n')
    assert wire.sent == b'9;a=b\r\n{"a":12}\n\r\n'


@pytest.mark.parametrize("before", [b"", b'8\r\n{"a":1}\n\r\n', b'3\r\n{"a\r\n5\r\n":1}\n\r\n'])
async def test_broken_framing_is_the_nodes_failure_and_costs_nothing_that_came_before(before: bytes) -> None:
    wire, spliced, _ = splice()
    spliced.data(before + b"\x16\x03\x01this is no size\r\n")
    with pytest.raises(Lost, match="framing is broken"):
        await spliced.run()
    assert Chunked().feed(wire.sent) == (b'{"a":1}\n' if before else b"")


async def test_a_client_that_leaves_ends_it() -> None:
    _, spliced, _ = splice()
    spliced.interrupt()
    with pytest.raises(ClientLeft):
        await spliced.run()


@given(st.integers(1, 40), st.integers(0, 39))
async def test_chunks_stay_what_they_were_behind_one_that_came_in_pieces(lines: int, cut_at: int) -> None:
    """A client that is read in large pieces still gets its tokens one by one."""
    wire, spliced, _ = splice()
    first = chunk(b'{"response":"in two pieces"}\n')
    rest = chunk(b'{"response":"whole"}\n') * lines
    wire.follower.feed(first[:cut_at])  # as while the answer's beginning was held back
    again = Splice(wire, wire.write, spliced._tee, chunked=True)  # type: ignore[arg-type]
    again.data(first[cut_at:] + rest + END)
    await again.run()
    assert wire.sent.endswith(rest)
