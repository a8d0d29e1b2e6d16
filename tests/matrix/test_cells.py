"""The matrix itself: complete, without dead rules, able to fail, and shown as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import orjson
import pytest

from tests.fakes.tokens import expected_text
from tests.matrix import summary
from tests.matrix.asking import prompt
from tests.matrix.cells import CELLS, EXCHANGES, RULES, Cell, Exchange, What, When, combinations, why_not
from tests.matrix.check import Asked, problems
from tests.matrix.client import Seen
from tests.matrix.expectation import ROWS, TOKENS, Sees, expectation
from tests.matrix.faulty import fault, moment
from tests.matrix.groups import GROUPS
from tests.matrix.runs import RUNS

STREAM = Exchange("native", True, "small")
ELSEWHERE = Cell(What.RST, When.HEAD, STREAM)
CUT = Cell(What.RST, When.MID, STREAM)
UPLOAD = Cell(What.RST, When.HEAD, Exchange("native", False, "blob"))
NODE = "127.0.0.1:11434"


def test_every_combination_is_a_cell_or_has_a_reason_why_not() -> None:
    every = list(combinations())
    assert len(every) == len(What) * len(When) * len(EXCHANGES) == len(set(every))
    assert [cell for cell in every if why_not(cell) is None] == list(CELLS)


def test_no_rule_is_idle() -> None:
    used = Counter(why_not(cell) for cell in combinations())
    assert [rule.reason for rule in RULES if not used[rule.reason]] == []


def test_no_row_is_idle() -> None:
    first = Counter(next(i for i, (matches, _) in enumerate(ROWS) if matches(cell)) for cell in CELLS)
    assert [i for i in range(len(ROWS)) if not first[i]] == []


@pytest.mark.parametrize("each", [*What, *When, *EXCHANGES], ids=str)
def test_nothing_is_left_out_altogether(each: What | When | Exchange) -> None:
    assert any(each in (cell.what, cell.when, cell.exchange) for cell in CELLS)


def test_the_groups_are_all_cells_once() -> None:
    assert Counter(cell for cells in GROUPS.values() for cell in cells) == Counter(CELLS)


def test_every_cell_has_a_fault_of_its_own() -> None:
    made = Counter(
        (cell.exchange, *moment(cell), vars(found)["do"], found.bytes, found.text, found.status)
        for cell in CELLS
        if (found := fault(cell)) is not None
    )
    twice = [key for key, count in made.items() if count > 1]
    assert twice == []


def test_a_client_is_never_shown_less_beside_a_healthy_node() -> None:
    order = list(Sees)
    for run in RUNS:
        if run.alone:
            assert order.index(expectation(run.cell).sees) <= order.index(run.wanted.sees)


def test_what_must_not_be_sent_twice_never_is() -> None:
    for cell in CELLS:
        if cell.exchange.upload:
            assert expectation(cell).once and not expectation(cell).elsewhere


def _line(text: str, **more: object) -> bytes:
    return orjson.dumps({"message": {"content": text}, **more}) + b"\n"


def _whole(tag: str) -> bytes:
    words = expected_text(prompt(tag)).split(" ")[1:]
    lines = [_line(f" {word}", done=False) for word in words]
    assert len(lines) == TOKENS
    return b"".join(lines) + _line("", done=True)


GOOD = Seen(200, {"x-sollol-request-id": "1"}, _whole("t"), ended=True)
TOLD = orjson.dumps({"error": "gone (request id 1)"}) + b"\n"
BROKEN_OFF = replace(GOOD, body=b"".join(GOOD.body.splitlines(keepends=True)[:5]) + TOLD)


def wrong(cell: Cell, seen: Seen, faulty: int = 1, healthy: int = 0) -> list[str]:
    return list(problems(cell, expectation(cell), "t", NODE, seen, Asked(faulty, healthy)))


def test_what_must_be_seen_is_accepted() -> None:
    assert wrong(ELSEWHERE, GOOD, healthy=1) == []
    assert wrong(CUT, BROKEN_OFF) == []


@pytest.mark.parametrize(
    ("cell", "seen", "healthy"),
    [
        (ELSEWHERE, GOOD, 0),
        (ELSEWHERE, GOOD, 2),
        (ELSEWHERE, replace(GOOD, ended=False), 1),
        (ELSEWHERE, replace(GOOD, problem="bytes after the end"), 1),
        (ELSEWHERE, replace(GOOD, headers={}), 1),
        (ELSEWHERE, replace(GOOD, status=500), 1),
        (ELSEWHERE, replace(GOOD, body=_whole("other")), 1),
        (ELSEWHERE, replace(GOOD, body=GOOD.body.replace(_line(" t-3", done=False), b"")), 1),
        (ELSEWHERE, replace(GOOD, body=GOOD.body + TOLD), 1),
        (ELSEWHERE, replace(GOOD, body=GOOD.body[:-5]), 1),
        (CUT, GOOD, 0),
        (CUT, BROKEN_OFF, 1),
        (CUT, replace(BROKEN_OFF, body=BROKEN_OFF.body.removesuffix(TOLD)), 0),
        (CUT, replace(BROKEN_OFF, body=BROKEN_OFF.body.replace(b"id 1", b"id 2")), 0),
        (CUT, replace(BROKEN_OFF, body=BROKEN_OFF.body.replace(_line(" t-4", done=False), b"")), 0),
    ],
)
def test_what_must_not_be_seen_is_found(cell: Cell, seen: Seen, healthy: int) -> None:
    assert wrong(cell, seen, healthy=healthy)


def test_an_upload_that_was_sent_twice_is_found() -> None:
    sorry = orjson.dumps({"error": f"node {NODE} failed"})
    seen = Seen(503, {"x-sollol-request-id": "1", "retry-after": "2"}, sorry, ended=True)
    assert wrong(UPLOAD, seen) == []
    assert wrong(UPLOAD, seen, faulty=2)
    assert wrong(UPLOAD, seen, healthy=1)


def test_the_page_shows_the_matrix_as_it_is() -> None:
    text = summary.DOC.read_text("utf-8")
    assert summary.renewed(text) == text, "run: python -m tests.matrix"
