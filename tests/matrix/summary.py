"""The matrix as a table in Markdown, and its place in ``docs/failover.md``. Pure but for the path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tests.matrix.cells import CELLS, RULES, Cell, Exchange, combinations, why_not
from tests.matrix.expectation import Sees, expectation
from tests.matrix.runs import RUNS

DOC = Path(__file__).resolve().parents[2] / "docs" / "failover.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"

#: What stands in the table for what a client sees, and the sentence that explains it.
WORDS: dict[Sees, str] = {
    Sees.WHOLE_HERE: "whole",
    Sees.WHOLE_ELSEWHERE: "whole, from the other",
    Sees.CUT: "cut",
    Sees.ITS_WORDS: "its words",
    Sees.SORRY: "503",
    Sees.WAITS: "waits",
}
MEANING: dict[Sees, str] = {
    Sees.WHOLE_HERE: "the whole answer of the node, which is asked once; the other node is not asked",
    Sees.WHOLE_ELSEWHERE: "the whole answer of the other node, which is asked once",
    Sees.CUT: "every token that the node sent, then an error in the protocol with the request's id",
    Sees.ITS_WORDS: "the node's own error: its status, its sentence",
    Sees.SORRY: "503 with `Retry-After` and a sentence that names the node and what was wrong",
    Sees.WAITS: "nothing, while the node answers polls: it may hash 100 GB; it learns when the client leaves",
}
HEAD = "| what goes wrong | when | cells | beside a healthy node | as the only node |"


def _form(exchange: Exchange) -> str:
    return "upload" if exchange.upload else "stream" if exchange.stream else "answer"


#: How exchanges can be told apart, the coarsest way first.
KINDS: tuple[Callable[[Exchange], str], ...] = (
    lambda exchange: "",
    lambda exchange: "upload" if exchange.upload else "",
    _form,
    lambda exchange: f"{exchange.protocol} {_form(exchange)}",
)


def lines() -> Iterator[str]:
    """The summary."""
    alone = sum(run.alone for run in RUNS)
    every = sum(1 for _ in combinations())
    yield f"{every} combinations, of which {len(CELLS)} can be. Each of these is run beside a healthy node,"
    yield f"{alone} also without one; all these {len(RUNS)} runs with `splice` on and off."
    yield from ("", "| in the table | what the client sees |", "|---|---|")
    yield from (f"| {WORDS[sees]} | {MEANING[sees]} |" for sees in Sees)
    yield from ("", HEAD, "|---|---|--:|---|---|")
    for (what, when), group in groupby(CELLS, key=lambda cell: (cell.what, cell.when)):
        cells = list(group)
        only = [cell for cell in cells if expectation(cell) != expectation(cell, alone=True)]
        without = outcomes(cells, alone=True) if only else "the same"
        yield f"| {what} | {when} | {len(cells)} | {outcomes(cells)} | {without} |"
    counts = Counter(why_not(cell) for cell in combinations())
    yield from ("", "| what cannot be | combinations |", "|---|--:|")
    yield from (f"| {rule.reason} | {counts[rule.reason]} |" for rule in RULES)


def outcomes(cells: Sequence[Cell], alone: bool = False) -> str:
    """What clients see in ``cells``, told apart no further than it makes a difference."""
    for kind in KINDS:
        seen: dict[str, set[str]] = {}
        for cell in cells:
            seen.setdefault(kind(cell.exchange), set()).add(WORDS[expectation(cell, alone).sees])
        if all(len(words) == 1 for words in seen.values()):
            break
    return "; ".join(f"{label}: {word}" if label else word for label, (word,) in seen.items())


def renewed(text: str) -> str:
    """``text`` with what is between the marks made anew.

    Raises:
        ValueError: if it lacks the marks.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOC.name} lacks {BEGIN} or {END}")
    table = "\n".join(lines())
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"
