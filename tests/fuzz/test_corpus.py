"""What the coverage-guided run began with and what it has found, fed to its targets once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

KEPT = sorted(path for path in (Path(__file__).parent / "corpus").glob("*/*") if path.is_file())


def test_each_target_has_a_corpus() -> None:
    assert {path.parent.name for path in KEPT} == set(TARGETS)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_kept_holds(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())
