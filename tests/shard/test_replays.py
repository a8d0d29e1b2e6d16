"""How often a request is run again whose model broke: enough for lost machines, no more."""

from __future__ import annotations

import pytest

from shard.node import Replays


@pytest.mark.parametrize(
    ("blamed", "runs_again"),
    [
        ([True, True, True, True], [True, True, True, False]),
        ([False, False], [True, False]),
        ([True, False, True, False], [True, True, True, False]),
        ([False, True, False], [True, True, False]),
    ],
)
def test_a_machine_to_blame_is_worth_more_tries(blamed: list[bool], runs_again: list[bool]) -> None:
    tries = Replays()
    assert [tries.another(blamed=one) for one in blamed] == runs_again
