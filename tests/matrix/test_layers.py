"""Every cell of the fault matrix against the real proxy, with ``splice`` off: over mitmproxy's layers."""

from __future__ import annotations

import pytest

from tests.matrix.groups import GROUPS, TIMEOUT_S, check


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("group", GROUPS)
async def test_every_cell_shows_the_client_what_it_must(group: str) -> None:
    await check(group, splice=False)
