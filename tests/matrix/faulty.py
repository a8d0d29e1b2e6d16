"""A cell's fault, put on a fake node."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from tests.fakes.faults import TEXTS, Action, Fault, Moment
from tests.fakes.ollama_node import FakeOllama
from tests.matrix.asking import path
from tests.matrix.cells import Cell, Protocol, What, When
from tests.matrix.expectation import TOKENS_BEFORE

LATE_S = 0.2  #: how late a node accepts that does so in time
LONG_LINE_BYTES = 10 << 20
MIDDLE_OF_A_REQUEST_BYTES = 5 << 20
PIECE_BYTES = 24  #: of a trickle
UNKNOWN_TEXT = "the stars are not aligned"

#: What a node says in an error, and with which status.
WORDS: dict[What, tuple[int, str]] = {
    What.BROKEN: TEXTS["v024_terminated"],
    What.OOM: TEXTS["oom_cuda"],
    What.BUSY: TEXTS["busy"],
    What.UNKNOWN: (500, UNKNOWN_TEXT),
    What.EARLY_DONE: (201, ""),
    What.EARLY_ERROR: (400, UNKNOWN_TEXT),
    What.EARLY_BUSY: TEXTS["busy"],
}
_DO: dict[What, Action] = {
    What.RST: "rst",
    What.FIN: "fin",
    What.GARBAGE: "garbage",
    What.SILENCE: "hang",
    What.NEVER_READ: "hang",
    What.HALF_HEAD: "fin",
    What.HALF_HEAD_SILENCE: "hang",
    What.BROKEN: "error",
    What.OOM: "error",
    What.UNKNOWN: "error",
    What.TRICKLE: "trickle",
    What.ENDS_EARLY: "end",
    What.CUT_CHUNK: "cut_chunk",
    What.BAD_CHUNK: "bad_chunk",
    What.TOO_LONG: "length",
    What.TOO_SHORT: "short",
    What.LONG_LINE: "long",
    What.LONG_LINE_CUT: "long_cut",
}
_AT: dict[When, Moment] = {
    When.CONNECT: "connect",
    When.REQUEST: "mid_body",
    When.HEAD: "before_head",
    When.MID: "after_chunks",
    When.LAST_BYTE: "before_end",
}
#: Faults of an object: as the first, the sixth or the last one, never between two.
_OF_AN_OBJECT = {
    What.BROKEN,
    What.OOM,
    What.UNKNOWN,
    What.ENDS_EARLY,
    What.CUT_CHUNK,
    What.BAD_CHUNK,
    What.LONG_LINE,
    What.LONG_LINE_CUT,
    What.TRICKLE,
}
_BEFORE_THE_LAST = {What.ENDS_EARLY, What.LONG_LINE, What.LONG_LINE_CUT}
_IN_ONE_PIECE = {What.TOO_LONG, What.TOO_SHORT, What.LONG_LINE, What.LONG_LINE_CUT, What.TRICKLE}
_FINAL: dict[Protocol, bytes] = {"native": b'"done":true', "openai": b"[DONE]", "anthropic": b"message_stop"}
_SIZE = {
    What.TRICKLE: PIECE_BYTES,
    What.LONG_LINE: LONG_LINE_BYTES,
    What.LONG_LINE_CUT: LONG_LINE_BYTES,
    What.TOO_LONG: 10,
}


def moment(cell: Cell) -> tuple[Moment, int]:
    """When the fake acts, and after how many pieces of a stream."""
    if cell.what in (What.HALF_HEAD, What.HALF_HEAD_SILENCE):
        return "mid_head", 0
    if cell.what is What.TRICKLE and cell.when is When.MID and not cell.exchange.stream:
        return "after_head", 0
    if cell.when is When.MID:
        return ("after_chunks" if cell.exchange.stream else "mid_line"), TOKENS_BEFORE
    if cell.when is When.LAST_BYTE and cell.what in _BEFORE_THE_LAST:
        return "before_last", 0
    if cell.when is When.FIRST_BYTE:
        return ("after_chunks" if cell.what in _OF_AN_OBJECT else "after_head"), 0
    return _AT[cell.when], 0


def waits(cell: Cell) -> bool:
    """Whether the fault of ``cell`` comes only once the client has seen what was sent before it.

    So what has reached the client then is no matter of chance. Lengths and lines are sent in one piece.
    """
    late = cell.when is When.MID or (cell.when is When.LAST_BYTE and cell.what not in _BEFORE_THE_LAST)
    return cell.exchange.stream and late and cell.what not in _IN_ONE_PIECE


def seen(cell: Cell, body: bytes) -> bool:
    """Whether ``body`` is all that the node sends before its fault."""
    separator = b"\n" if cell.exchange.protocol == "native" else b"\n\n"
    if cell.when is When.MID:
        return body.count(separator) >= TOKENS_BEFORE
    return _FINAL[cell.exchange.protocol] in body and body.endswith(separator)


def fault(cell: Cell, gate: asyncio.Event | None = None) -> Fault | None:
    """The fault that waits on the node for ``cell``; None where the node as a whole is at fault."""
    if cell.what in (What.REFUSE, What.BLACK_HOLE, What.SLOW_ACCEPT):
        return None
    where: dict[str, Any] = {"times": None} if cell.when is When.CONNECT else _requests(cell)
    if waits(cell):
        where["gate"] = gate
    if cell.what in WORDS and cell.when in (When.HEAD, When.REQUEST):
        status, text = WORDS[cell.what]
        at: Literal["before_head", "mid_body"] = "before_head" if cell.when is When.HEAD else "mid_body"
        return Fault("reply", at, status=status, text=text, **where)
    at_, chunks = moment(cell)
    size = MIDDLE_OF_A_REQUEST_BYTES if cell.when is When.REQUEST else _SIZE.get(cell.what, 0)
    text = WORDS[cell.what][1] if cell.what in WORDS else ""
    return Fault(_DO[cell.what], at_, bytes=size, chunks=chunks, text=text, **where)


def _requests(cell: Cell) -> dict[str, Any]:
    """Which requests a fault waits for: the cell's, not the looks at the node."""
    return {"times": None, "method": "POST", "path": path(cell.exchange)}


async def break_down(node: FakeOllama, cell: Cell, gate: asyncio.Event) -> None:
    """Let ``node`` fail as ``cell`` says, from now on; ``gate`` is set when :func:`seen`."""
    if cell.what is What.REFUSE:
        await node.refuse()
    elif cell.what is What.BLACK_HOLE:
        await node.drop_syns()
    elif cell.what is What.SLOW_ACCEPT:
        node.slow_accept(LATE_S)
    elif (made := fault(cell, gate)) is not None:
        node.fail(made)


async def heal(node: FakeOllama, cell: Cell) -> None:
    """Let ``node`` be well again."""
    node.heal()
    if cell.what in (What.REFUSE, What.BLACK_HOLE):
        await node.accept_again()
