"""Which cells are run without a healthy node as well. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.matrix.cells import CELLS, Cell
from tests.matrix.expectation import Expectation, expectation


@dataclass(frozen=True, slots=True)
class Run:
    """A cell with a healthy node beside the faulty one, or ``alone``."""

    cell: Cell
    alone: bool

    def __str__(self) -> str:
        return f"{self.cell}{' | alone' if self.alone else ''}"

    @property
    def wanted(self) -> Expectation:
        """What the client must see."""
        return expectation(self.cell, self.alone)


def runs(cells: Iterable[Cell]) -> Iterator[Run]:
    """The runs of ``cells``: alone as well where that changes what is seen, then with small bodies only."""
    for cell in cells:
        yield Run(cell, alone=False)
        if cell.exchange.body == "small" and expectation(cell) != expectation(cell, alone=True):
            yield Run(cell, alone=True)


RUNS: tuple[Run, ...] = tuple(runs(CELLS))
