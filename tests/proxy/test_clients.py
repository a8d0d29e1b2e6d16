"""How many clients there may be, and who makes room for one more."""

from __future__ import annotations

from functools import partial

from proxy_addon.clients import Clients


def test_whoever_has_been_idle_for_longest_makes_room_once() -> None:
    closed: list[str] = []
    clients = Clients(lambda: 3)
    for name in "abc":
        assert clients.enter(name, partial(closed.append, name))
    assert clients.busy("a") and not clients.busy("a")
    assert clients.enter("d", partial(closed.append, "d")) and closed == ["b"]
    assert clients.enter("e", partial(closed.append, "e")) and closed == ["b", "c"]  # "b" has not gone yet
    clients.idle("a")
    assert clients.enter("f", partial(closed.append, "f")) and closed == ["b", "c", "d"]


def test_where_all_are_in_use_one_more_may_not_stay() -> None:
    clients = Clients(lambda: 1)
    clients.enter("a", lambda: None)
    clients.busy("a")
    assert not clients.enter("b", lambda: None)
    assert not clients.is_idle("b")  # it is going already
    clients.leave("a")
    clients.leave("b")
    assert clients.enter("c", lambda: None)


def test_whoever_has_left_is_not_idle_again() -> None:
    """The end of an answer may come behind the end of its connection; nobody would be closed for it."""
    closed: list[str] = []
    clients = Clients(lambda: 1)
    clients.enter("a", partial(closed.append, "a"))
    clients.busy("a")
    clients.leave("a")
    clients.idle("a")
    assert clients.enter("b", partial(closed.append, "b")) and clients.is_idle("b")
    assert clients.enter("c", partial(closed.append, "c")) and closed == ["b"]
