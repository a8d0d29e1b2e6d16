"""What the client must see in each cell. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from tests.matrix.cells import Cell, What, When

TOKENS = 12  #: of a whole answer
TOKENS_BEFORE = 5  #: pieces of a stream that come before what happens in mid-stream


class Sees(StrEnum):
    """What a client can be shown."""

    WHOLE_HERE = "the whole answer of the node"
    WHOLE_ELSEWHERE = "the whole answer, of the other node"
    CUT = "the tokens so far, then an error in its protocol"
    ITS_WORDS = "the node's own error"
    SORRY = "503: the node, the reason, the request's id"
    WAITS = "nothing, as long as the node answers polls"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be seen of one cell."""

    sees: Sees
    status: int | None
    tokens: int  #: of the answer, exactly
    half_line: bool = False  #: before the error there is half of a line that was too long to hold back
    of_the_node: bool = False  #: the error is in the node's words, whatever SOLLOL would say
    once: bool = False  #: no node may be asked a second time

    @property
    def elsewhere(self) -> int:
        """How often the other node is asked."""
        return int(self.sees is Sees.WHOLE_ELSEWHERE)


_UNHARMED = {What.SLOW_ACCEPT, What.TRICKLE, What.LONG_LINE, What.EARLY_DONE}
_SILENT = {What.NEVER_READ, What.SILENCE, What.HALF_HEAD_SILENCE}
_STATUS = {
    What.BROKEN: 500,
    What.OOM: 500,
    What.UNKNOWN: 500,
    What.BUSY: 503,
    What.EARLY_ERROR: 400,
    What.EARLY_BUSY: 503,
}
_OF_THE_CLIENT = {What.UNKNOWN, What.EARLY_ERROR}
_BODY = {When.FIRST_BYTE, When.MID, When.LAST_BYTE}

#: The first row that matches decides.
ROWS: tuple[tuple[Callable[[Cell], bool], Sees], ...] = (
    # A head of 10 MB is none. All else of this is unusual, but an answer.
    (
        lambda c: c.what in _UNHARMED and not (c.what is What.LONG_LINE and c.when is When.HEAD),
        Sees.WHOLE_HERE,
    ),
    # A node may hash an upload of 100 GB for as long as it takes.
    (lambda c: c.exchange.upload and c.what in _SILENT, Sees.WAITS),
    (lambda c: c.exchange.upload and c.what in _STATUS, Sees.ITS_WORDS),
    (lambda c: c.exchange.upload, Sees.SORRY),
    # Bad requests are bad on any node; what an answer means that is not known, the client shall know.
    (lambda c: c.what in _OF_THE_CLIENT and c.when not in _BODY, Sees.ITS_WORDS),
    # Nothing has reached the client, or nothing of an answer that is held back until it is whole.
    (lambda c: c.when not in _BODY or not c.exchange.stream, Sees.WHOLE_ELSEWHERE),
    # Whatever has gone out of a line that is too long to hold back cannot be taken back.
    (lambda c: c.what is What.LONG_LINE_CUT, Sees.CUT),
    # Ollama's other surfaces say an error within a stream without words, or not at all.
    (
        lambda c: c.what is What.UNKNOWN and c.when is When.FIRST_BYTE and c.exchange.protocol == "native",
        Sees.ITS_WORDS,
    ),
    (lambda c: c.when is When.FIRST_BYTE, Sees.WHOLE_ELSEWHERE),
    # The final object is not there; where it is, nothing is missing but the mark of the body's end.
    (lambda c: c.when is When.MID or c.what in {What.ENDS_EARLY, What.TOO_SHORT}, Sees.CUT),
    (lambda c: True, Sees.WHOLE_HERE),
)


def expectation(cell: Cell, alone: bool = False) -> Expectation:
    """What must be seen in ``cell``; ``alone``: where no other node has the model."""
    sees = next(sees for matches, sees in ROWS if matches(cell))
    if alone and sees is Sees.WHOLE_ELSEWHERE:
        sees = Sees.ITS_WORDS if cell.what in _STATUS and cell.when not in _BODY else Sees.SORRY
    return Expectation(
        sees,
        _status(cell, sees),
        _tokens(cell, sees),
        of_the_node=sees is Sees.ITS_WORDS
        or (sees is Sees.CUT and cell.what in _STATUS and cell.exchange.protocol == "native"),
        half_line=sees is Sees.CUT and cell.what is What.LONG_LINE_CUT,
        once=cell.exchange.upload,
    )


def _status(cell: Cell, sees: Sees) -> int | None:
    if sees is Sees.ITS_WORDS:
        return _STATUS[cell.what]
    if sees is Sees.SORRY:
        return 503
    if sees is Sees.WAITS:
        return None
    return 201 if cell.exchange.upload else 200


def _tokens(cell: Cell, sees: Sees) -> int:
    if cell.exchange.upload or sees in {Sees.ITS_WORDS, Sees.SORRY}:
        return 0
    if sees is not Sees.CUT or cell.when is When.LAST_BYTE:
        return TOKENS
    if cell.when is When.FIRST_BYTE:
        return 0
    # An Anthropic stream begins with two events that have no token.
    return TOKENS_BEFORE - 2 if cell.exchange.protocol == "anthropic" else TOKENS_BEFORE
