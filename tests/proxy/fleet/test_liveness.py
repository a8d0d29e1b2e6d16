from __future__ import annotations

import pytest

from proxy_addon.fleet.liveness import Liveness

#: a answer, f no answer, r refused → the changes, one for each poll
STORIES = [
    ("a", ["up"]),
    ("aa", ["up", None]),
    ("aff", ["up", None, "lost"]),
    ("afaff", ["up", None, None, None, "lost"]),
    ("ar", ["up", "lost"]),
    ("arffa", ["up", "lost", None, None, "back"]),
    ("rra", ["lost", None, "up"]),  # it was never seen before: not "back"
    ("raffa", ["lost", "up", None, "lost", "back"]),
]


@pytest.mark.parametrize(("story", "changes"), STORIES)
def test_changes(story: str, changes: list[str | None]) -> None:
    alive = Liveness(failures_to_lose=2)
    told = [
        alive.answered(s) if poll == "a" else alive.failed(s, poll == "r") for s, poll in enumerate(story)
    ]
    assert told == changes


def test_it_remembers_since_when() -> None:
    alive = Liveness(failures_to_lose=1)
    alive.answered(10)
    alive.answered(11)
    assert (alive.state, alive.since_s) == ("up", 10)
    alive.failed(12)
    alive.failed(13)
    assert (alive.state, alive.since_s) == ("lost", 12)
