"""What tests of the proxy's data path share."""

from __future__ import annotations

import pytest

from tests.proxy import running


@pytest.fixture(params=[True, False], ids=["splice", "layers"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with bodies spliced from socket to socket, and through mitmproxy's layers."""
    monkeypatch.setitem(running.FAST, "splice", request.param)
