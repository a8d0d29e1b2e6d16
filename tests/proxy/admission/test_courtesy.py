"""Whose turn it is where several proxies have a line for the same model."""

from __future__ import annotations

from proxy_addon.admission.courtesy import LEFT_S, Courtesy


class Lines:
    """What waits elsewhere, as a test says."""

    def __init__(self, **lines: int) -> None:
        self.lines = lines
        self.courtesy = Courtesy(self.lines.get)

    def goes(self, priority: int = 5, at_s: float = 0.0) -> bool:
        return self.courtesy.until_s("m", priority, at_s) is None


def test_alone_everybody_goes() -> None:
    here = Lines(other=9)
    for _ in range(3):
        assert here.goes()
        here.courtesy.started("m")


def test_two_lines_take_turns() -> None:
    here = Lines(m=5)
    for _ in range(3):
        assert here.goes()
        here.courtesy.started("m")
        assert not here.goes()
        here.courtesy.seen("m")


def test_a_slot_is_left_for_a_moment_only() -> None:
    here = Lines(m=5)
    here.courtesy.started("m")
    assert here.courtesy.until_s("m", 5, 7.0) == 7.0 + LEFT_S
    assert not here.goes(at_s=7.0 + LEFT_S / 2)
    assert here.goes(at_s=7.0 + LEFT_S)
    here.courtesy.started("m")
    assert not here.goes(at_s=8.0)  # the next one is left to them as well


def test_the_more_urgent_line_goes_first() -> None:
    here = Lines(m=5)
    here.courtesy.started("m")
    assert here.goes(priority=6)
    assert not here.goes(priority=4)
    here.courtesy.seen("m")
    assert here.goes(priority=5)
    assert not here.goes(priority=4)


def test_who_waits_no_more_is_owed_nothing() -> None:
    here = Lines(m=5)
    here.courtesy.started("m")
    assert not here.goes()
    del here.lines["m"]
    assert here.goes()
