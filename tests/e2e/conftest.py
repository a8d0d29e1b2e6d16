"""The house that every client visits."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.e2e.house import House, open_house


@pytest.fixture(autouse=True)
def no_detours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients read these, and would go elsewhere."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("OLLAMA_HOST", "OLLAMA_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "SOLLOL_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened
