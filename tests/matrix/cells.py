"""The cells of the fault matrix: what goes wrong × when × in which exchange. Pure.

A combination that cannot be is named by the first of :data:`RULES` that it breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Literal

Protocol = Literal["native", "openai", "anthropic"]
Body = Literal["small", "20 MB", "blob"]


class What(StrEnum):
    """What goes wrong on the node."""

    REFUSE = "connection refused"
    BLACK_HOLE = "black hole: SYNs are dropped"
    NEVER_READ = "connected, but never read"
    SLOW_ACCEPT = "accepted late"
    RST = "RST"
    FIN = "FIN"
    GARBAGE = "garbage"
    SILENCE = "silence"
    HALF_HEAD = "half a head, then FIN"
    HALF_HEAD_SILENCE = "half a head, then silence"
    BROKEN = "500, the runner has died"
    OOM = "500, out of memory"
    BUSY = "503, busy"
    UNKNOWN = "500, words of no known meaning"
    TRICKLE = "a trickle"
    ENDS_EARLY = "a clean end too early"
    CUT_CHUNK = "a chunk cut short"
    BAD_CHUNK = "a chunk without a size"
    TOO_LONG = "Content-Length too large"
    TOO_SHORT = "Content-Length too small"
    LONG_LINE = "a line of 10 MB"
    LONG_LINE_CUT = "a line of 10 MB, cut by RST"
    EARLY_DONE = "201 before the upload was read"
    EARLY_ERROR = "400 before the request was read"
    EARLY_BUSY = "503 before the request was read"


class When(StrEnum):
    """How far the exchange has got."""

    CONNECT = "before connect"
    REQUEST = "mid-request"
    HEAD = "before headers"
    FIRST_BYTE = "before the first byte"
    MID = "mid-stream"
    LAST_BYTE = "at the last byte"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the client asks: in which protocol, for a stream or not, with how large a body."""

    protocol: Protocol
    stream: bool
    body: Body

    def __str__(self) -> str:
        form = "upload" if self.upload else "stream" if self.stream else "whole"
        return f"{self.protocol} {form} {self.body}"

    @property
    def upload(self) -> bool:
        """Whether it is the upload of a blob, which must not be sent twice."""
        return self.body == "blob"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    what: What
    when: When
    exchange: Exchange

    def __str__(self) -> str:
        return f"{self.what} | {self.when} | {self.exchange}"


PROTOCOLS: tuple[Protocol, ...] = ("native", "openai", "anthropic")
EXCHANGES: tuple[Exchange, ...] = (
    *(Exchange(*each) for each in product(PROTOCOLS, (True, False), ("small", "20 MB"))),  # type: ignore[arg-type]
    Exchange("native", False, "blob"),
)

_OF_THE_CONNECTION = {What.REFUSE, What.BLACK_HOLE, What.NEVER_READ, What.SLOW_ACCEPT}
_HALF_HEAD = {What.HALF_HEAD, What.HALF_HEAD_SILENCE}
_EARLY = {What.EARLY_DONE, What.EARLY_ERROR, What.EARLY_BUSY}
_TEXTS = {What.BROKEN, What.OOM, What.BUSY, What.UNKNOWN}
_CHUNKS = {What.CUT_CHUNK, What.BAD_CHUNK}
_LENGTHS = {What.TOO_LONG, What.TOO_SHORT}
_LINES = {What.LONG_LINE, What.LONG_LINE_CUT}
_BREAKS = {What.RST, What.FIN, What.GARBAGE, What.SILENCE}
_OF_THE_BODY = {When.FIRST_BYTE, When.MID, When.LAST_BYTE}


@dataclass(frozen=True, slots=True)
class Rule:
    """Why some combinations cannot be."""

    reason: str
    forbids: Callable[[Cell], bool]


RULES: tuple[Rule, ...] = (
    Rule(
        "what keeps a connection from being made is over once it is made",
        lambda c: c.what in _OF_THE_CONNECTION and c.when is not When.CONNECT,
    ),
    Rule(
        "silence at the connection is a row of its own: never read",
        lambda c: c.what is What.SILENCE and c.when is When.CONNECT,
    ),
    Rule(
        "before it is connected a node can only refuse, break off or send garbage",
        lambda c: c.when is When.CONNECT and c.what not in _OF_THE_CONNECTION | _BREAKS,
    ),
    Rule(
        "a small request is one segment, it has no middle",
        lambda c: c.when is When.REQUEST and c.exchange.body == "small",
    ),
    Rule(
        "in mid-request a node can only break off or answer early",
        lambda c: c.when is When.REQUEST and c.what not in _BREAKS | _EARLY,
    ),
    Rule("an early answer comes in mid-request", lambda c: c.what in _EARLY and c.when is not When.REQUEST),
    Rule(
        "a node that has not read a prompt has no answer to it",
        lambda c: c.what is What.EARLY_DONE and not c.exchange.upload,
    ),
    Rule("half a head is a matter of the head", lambda c: c.what in _HALF_HEAD and c.when is not When.HEAD),
    Rule("the answer to an upload has no body", lambda c: c.exchange.upload and c.when in _OF_THE_BODY),
    Rule(
        "the answer to an upload has no body that could be wrong",
        lambda c: c.exchange.upload and c.what in {What.ENDS_EARLY} | _CHUNKS | _LENGTHS,
    ),
    Rule(
        "chunks, their end and their sizes are of the body",
        lambda c: c.what in {What.ENDS_EARLY} | _CHUNKS and c.when is When.HEAD,
    ),
    Rule(
        "an answer that is not streamed is not sent in chunks",
        lambda c: c.what in {What.ENDS_EARLY} | _CHUNKS and not c.exchange.stream,
    ),
    Rule(
        "an error after the head is an error within a stream",
        lambda c: c.what in _TEXTS and c.when in _OF_THE_BODY and not c.exchange.stream,
    ),
    Rule(
        "a node says that it is busy before it begins, or never",
        lambda c: c.what is What.BUSY and c.when in _OF_THE_BODY,
    ),
    Rule(
        "the runner's error takes the place of the last object, nothing comes after that",
        lambda c: c.what in _TEXTS and c.when is When.LAST_BYTE,
    ),
    Rule("a length is wrong of a body", lambda c: c.what in _LENGTHS and c.when is When.HEAD),
    Rule(
        "a length that is too large shows at the end alone",
        lambda c: c.what is What.TOO_LONG and c.when is not When.LAST_BYTE,
    ),
    Rule(
        "an answer that is not streamed is one object: its middle is all of it",
        lambda c: (
            c.what in {*_LINES, What.TRICKLE}
            and c.when in {When.FIRST_BYTE, When.LAST_BYTE}
            and not c.exchange.stream
        ),
    ),
    Rule(
        "after its last byte a trickle has nothing left",
        lambda c: c.what is What.TRICKLE and c.when is When.LAST_BYTE,
    ),
)


def why_not(cell: Cell) -> str | None:
    """Why ``cell`` cannot be; None if it can."""
    return next((rule.reason for rule in RULES if rule.forbids(cell)), None)


def combinations() -> Iterator[Cell]:
    """Every combination, whether it can be or not."""
    return (Cell(*each) for each in product(What, When, EXCHANGES))


CELLS: tuple[Cell, ...] = tuple(cell for cell in combinations() if why_not(cell) is None)
