from __future__ import annotations

import pytest

from proxy_addon.one_server.merge import Failure, Merge, Row

D = "sha256:" + "d" * 64
BAR = {"status": "pulling dddddddddddd", "digest": D, "total": 100}


def bar(completed: int, digest: str = D) -> Row:
    return {**BAR, "digest": digest, **({"completed": completed} if completed else {})}


def status(text: str) -> Row:
    return {"status": text}


def test_one_node_passes_through() -> None:
    rows = [
        status("pulling manifest"),
        bar(0),
        bar(50),
        bar(100),
        status("verifying"),
        status("writing manifest"),
    ]
    merge = Merge(["a"])
    assert [out for row in rows for out in merge.feed("a", row)] == rows
    assert merge.feed("a", status("success")) == [] and not merge.running
    assert merge.result() == (200, status("success"))


def test_a_status_is_told_once_when_the_last_node_says_it() -> None:
    merge = Merge(["a", "b"])
    assert merge.feed("a", status("pulling manifest")) == []
    assert merge.feed("b", status("pulling manifest")) == [status("pulling manifest")]
    assert merge.feed("a", status("pulling manifest")) == []


def test_a_bar_shows_the_slowest_node_and_the_layers_own_size() -> None:
    merge = Merge(["a", "b"])
    assert merge.feed("a", bar(60)) == []  # b has yet to come to this layer
    assert merge.feed("b", bar(20)) == [bar(20)]
    assert merge.feed("a", bar(100)) == []
    assert merge.feed("b", bar(90)) == [bar(90)]


def test_a_bar_never_runs_backwards() -> None:
    merge = Merge(["a"])
    merge.feed("a", bar(80))
    assert merge.feed("a", bar(30)) == []  # a broken part is fetched again
    assert merge.feed("a", bar(81)) == [bar(81)]


def test_a_finished_node_holds_nothing_back() -> None:
    merge = Merge(["a", "b"])
    merge.feed("a", status("only a says this"))
    merge.feed("b", bar(40))
    assert merge.feed("a", status("success")) == [bar(40)]
    assert merge.feed("b", status("success")) == [status("only a says this"), bar(100)]


def test_the_others_go_on_after_a_failure_which_is_told_and_listed() -> None:
    merge = Merge(["a", "b"])
    merge.feed("a", bar(70))
    rows = merge.feed("b", {"error": "no space left on device"})
    assert rows == [status("b failed: no space left on device; going on with a"), bar(70)]
    merge.feed("a", status("success"))
    failed = [{"node": "b", "error": "no space left on device"}]
    assert merge.result() == (200, {"status": "success", "failed": failed})


def test_a_replacement_starts_from_nothing_but_the_bar_stays() -> None:
    merge = Merge(["a"])
    merge.feed("a", bar(70))
    gone = Failure(502, "connection refused", unreachable=True)
    assert merge.fail("a", gone, "b") == [status("a failed: connection refused; going on with b")]
    assert merge.feed("b", bar(10)) == []
    assert merge.feed("b", bar(75)) == [bar(75)]


@pytest.mark.parametrize(
    ("failures", "result"),
    [
        ([("a", 404, "no such model")], (404, "no such model")),
        (
            [("a", 500, "file does not exist"), ("b", 500, "file does not exist")],
            (500, "file does not exist"),
        ),
        ([("a", 507, "disk full"), ("b", 502, "refused")], (507, "a failed: disk full; b failed: refused")),
    ],
)
def test_it_is_an_error_only_if_all_have_failed(
    failures: list[tuple[str, int, str]], result: tuple[int, str]
) -> None:
    merge = Merge(node for node, _, _ in failures)
    last = [merge.fail(node, Failure(code, message)) for node, code, message in failures][-1]
    assert last == []
    assert merge.result() == (result[0], {"error": result[1]})


def test_rows_without_numbers_do_no_harm() -> None:
    merge = Merge(["a"])
    odd = {"status": "pulling", "digest": D, "completed": "many"}
    assert merge.feed("a", odd) == [{"status": "pulling", "digest": D}]
