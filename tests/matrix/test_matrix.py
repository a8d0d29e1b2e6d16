"""Every cell of the fault matrix, run against the real proxy."""

from __future__ import annotations

import pytest

from tests.matrix.arena import run
from tests.matrix.cells import CELLS, What

#: Cells that run together: uploads share the choice of their nodes, all else shares only the proxy.
GROUPS = {
    "uploads": [cell for cell in CELLS if cell.exchange.upload],
    **{what.name.lower(): [c for c in CELLS if c.what is what and not c.exchange.upload] for what in What},
}


@pytest.mark.timeout(300)  # sixty cells with bodies of 20 MB, on a slow machine
@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
@pytest.mark.parametrize("group", [name for name, cells in GROUPS.items() if cells])
async def test_every_cell_shows_the_client_what_it_must(group: str, splice: bool) -> None:
    wrong = await run(GROUPS[group], splice)
    assert not wrong, "\n".join(f"{name}: {'; '.join(each)}" for name, each in wrong.items())
