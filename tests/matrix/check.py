"""Whether what a client saw and what the nodes received is what was to be expected. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.fakes.tokens import StreamError, check_stream
from tests.matrix.asking import heard, prompt
from tests.matrix.cells import Cell, Exchange, What
from tests.matrix.client import Seen
from tests.matrix.expectation import Expectation, Sees
from tests.matrix.faulty import LONG_LINE_BYTES, WORDS
from tests.proxy.asks import Heard


@dataclass(frozen=True, slots=True)
class Asked:
    """How often each node received the request."""

    faulty: int
    healthy: int


def problems(cell: Cell, wanted: Expectation, tag: str, node: str, seen: Seen, asked: Asked) -> Iterator[str]:
    """Each thing that is not as ``wanted``. ``node`` is the faulty one's name, ``tag`` that of the answer."""
    yield from _of_the_nodes(wanted, asked)
    if wanted.sees is Sees.WAITS:
        if seen.status is not None or seen.problem:
            yield f"the client got {seen.status} {seen.problem} {seen.body[:200]!r} instead of waiting"
        return
    if seen.problem or not seen.ended:
        yield f"the answer is not well-framed: {seen.problem or 'it has no end'}"
    if seen.status != wanted.status:
        yield f"status {seen.status} instead of {wanted.status}: {seen.body[:300]!r}"
        return
    if not seen.headers.get("x-sollol-request-id"):
        yield "no request id"
    try:
        answer = heard(cell.exchange, seen, wanted.half_line)
    except ValueError as problem:
        yield str(problem)
        return
    yield from _of_the_answer(cell, wanted, tag, node, answer)


def _of_the_nodes(wanted: Expectation, asked: Asked) -> Iterator[str]:
    if asked.healthy != wanted.elsewhere:
        yield f"the other node was asked {asked.healthy} times instead of {wanted.elsewhere}"
    if wanted.once and asked.faulty > 1:
        yield f"what must not be sent twice was sent {asked.faulty} times"


def _of_the_answer(cell: Cell, wanted: Expectation, tag: str, node: str, answer: Heard) -> Iterator[str]:
    error = answer.error
    if wanted.sees in (Sees.WHOLE_HERE, Sees.WHOLE_ELSEWHERE):
        if error is not None or not answer.ended:
            yield f"not a whole answer: error {error!r}, ended {answer.ended}"
    else:
        if answer.ended:
            yield "it looks whole"
        yield from _of_the_error(cell, wanted, node, error, answer)
    if not cell.exchange.upload:
        yield from _of_the_tokens(wanted, tag, answer)
    long = cell.what is What.LONG_LINE and wanted.sees is Sees.WHOLE_HERE and not cell.exchange.upload
    if long and len(answer.raw) < LONG_LINE_BYTES:
        yield "the long line is not in the answer"


def _of_the_error(
    cell: Cell, wanted: Expectation, node: str, error: str | None, answer: Heard
) -> Iterator[str]:
    if not error:
        yield "the client was not told"
    elif wanted.of_the_node:
        if WORDS[cell.what][1] not in error:
            yield f"not the node's words: {error!r}"
    elif wanted.sees is Sees.SORRY:
        if node not in error or "\n" in error:
            yield f"no sentence that names {node}: {error!r}"
        if answer.headers.get("retry-after") is None:
            yield "no Retry-After"
    elif f"(request id {answer.headers.get('x-sollol-request-id')})" not in error:
        yield f"no request id in {error!r}"


def _of_the_tokens(wanted: Expectation, tag: str, answer: Heard) -> Iterator[str]:
    whole = wanted.sees in (Sees.WHOLE_HERE, Sees.WHOLE_ELSEWHERE)
    try:
        got = check_stream(answer.text, prompt(tag), complete=whole)
    except StreamError as problem:
        yield str(problem)
        return
    if got != wanted.tokens:
        yield f"{got} tokens instead of {wanted.tokens}"


def next_one(exchange: Exchange, tag: str, seen: Seen) -> Iterator[str]:
    """What is wrong with the whole answer to the next request on the same connection."""
    if seen.problem or not seen.ended or seen.status != 200:
        yield f"the next request got {seen.status} {seen.problem} {seen.body[:300]!r}"
        return
    try:
        check_stream(heard(exchange, seen, False).text, prompt(tag))
    except (ValueError, StreamError) as problem:
        yield f"the next request: {problem}"
