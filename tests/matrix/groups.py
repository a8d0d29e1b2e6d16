"""Cells that run together: uploads share the choice of their nodes, all else shares only the proxy."""

from __future__ import annotations

from tests.matrix.arena import run
from tests.matrix.cells import CELLS, Cell, What

GROUPS: dict[str, list[Cell]] = {"uploads": [cell for cell in CELLS if cell.exchange.upload]}
for _what in What:
    if _cells := [cell for cell in CELLS if cell.what is _what and not cell.exchange.upload]:
        GROUPS[_what.name.lower()] = _cells

TIMEOUT_S = 300  #: of sixty cells with bodies of 20 MB, on a slow machine


async def check(group: str, *, splice: bool) -> None:
    """Run a group. Raises AssertionError with what was wrong in each of its runs."""
    wrong = await run(GROUPS[group], splice)
    assert not wrong, "\n".join(f"{name}: {'; '.join(each)}" for name, each in wrong.items())
