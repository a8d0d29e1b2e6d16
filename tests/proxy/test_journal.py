"""The journal: what an entry says, and that neither memory nor disk grows without bound."""

from __future__ import annotations

import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy_addon import ring_file
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Endpoint, match
from proxy_addon.entry import CANDIDATES, CURRENT, HEADER, Columns, pack, unpack
from proxy_addon.journal import Journal, parse, read
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.policies import POLICIES
from proxy_addon.record import Attempt, FinalStats, Record

NOON = datetime(2026, 8, 1, 12, 0, 0, tzinfo=UTC)


def chat() -> Endpoint:
    endpoint = match("/api/chat")
    assert endpoint is not None
    return endpoint


def finished(name: str, candidates: int = 2) -> Record:
    nodes = [f"n{i}:1" for i in range(candidates)]
    rows = tuple(Features(node, wait_s=i / 3, turn=i, notes=("resident",)) for i, node in enumerate(nodes))
    costs = tuple(
        Candidate(node, cost=i / 3, terms={"wait_s": i / 3, "decode_s": float(i)}, notes=("resident",))
        for i, node in enumerate(nodes)
    )
    record = Record(name, "native", 100.0, "10.0.0.9", chat())
    record.ask = Ask(chat(), "gemma3", "gemma3:latest", body={"messages": [{"content": "a secret"}]})
    record.ask.prefix = ((b"of the secret", 3),)
    out = Candidate("[fe80::1]:1", excluded="is down: refused")
    record.decisions = [
        Decision(
            *("finish_time", "n1:1", (*costs, out), "n1:1 finishes first"),
            ask=AskFeatures(prompt_tokens=1 / 3, kind="summarization"),
            rows=rows,
        )
    ]
    record.attempts = [Attempt("n0:1", 100.5, 101.0, "died", "reset"), Attempt("n1:1", 101.0, 104.0, "ok")]
    record.first_byte_s, record.ended_s = 102.0, 104.0
    record.stats = FinalStats(output_tokens=7)
    record.outcome, record.status = "ok", 200
    record.queued_s, record.queue_position, record.expected_wait_s = 1 / 3, 2, 1 / 7
    return record


def read_again(record: Record) -> dict[str, Any]:
    """What an entry says after it was on disk."""
    return unpack(orjson.loads(orjson.dumps(pack(record, NOON))), CURRENT)


def ids(directory: Path) -> list[str]:
    """Those on disk."""
    return [made["id"] for _, line in read(directory) if (made := parse(line)) is not None]


def test_an_entry_tells_the_whole_way() -> None:
    made = read_again(finished("a"))
    assert made["at"] == "2026-08-01T11:59:56.000+00:00"
    assert (made["duration_s"], made["first_byte_s"]) == (4.0, 2.0)
    assert (made["path"], made["model"], made["node"]) == ("/api/chat", "gemma3", "n1:1")
    assert (made["client"], made["kind"], made["complexity"]) == ("10.0.0.9", "generation", "simple")
    assert (made["priority"], made["requires_gpu"]) == (5, False)
    assert (made["queued_s"], made["queue_position"], made["expected_wait_s"]) == (0.333333, 2, 0.142857)
    assert made["attempts"][0] == {
        "node": "n0:1",
        "started_s": 0.5,
        "ended_s": 1.0,
        "outcome": "died",
        "detail": "reset",
    }
    assert made["stats"]["output_tokens"] == 7
    assert b"secret" not in orjson.dumps(pack(finished("a"), NOON))


def test_an_entry_has_every_candidate_with_its_terms_and_what_they_were_made_of() -> None:
    record = finished("a")
    (decision,) = read_again(record)["decisions"]
    first, second, out = decision["candidates"]
    assert out == {"node": "[fe80::1]:1", "excluded": "is down: refused"}
    assert (first["terms"], first["notes"]) == ({"wait_s": 0.0, "decode_s": 0.0}, ["resident"])
    assert (second["cost"], second["terms"]) == (0.333333, {"wait_s": 0.333333, "decode_s": 1.0})
    # Terms are for people; what is decided again must be what was decided on, to the last bit.
    assert tuple(Features.from_row(row["features"]) for row in (first, second)) == record.decisions[0].rows
    assert AskFeatures.from_row(decision["ask"]) == record.decisions[0].ask


def test_of_rows_and_costs_an_entry_tells_what_the_decision_itself_would() -> None:
    record, ask = finished("a"), AskFeatures(prompt_tokens=1 / 3, output_tokens=30.0)
    rows = [Features(f"n{i}:1", wait_s=i / 3, s_per_output_token=1 / 70, notes=("resident",)) for i in (0, 1)]
    how = POLICIES["finish_time"]
    costs = [how.cost(ask, row) for row in rows]
    chosen = Decision.by("finish_time", how, ask, rows, costs, 0, [("m:1", "is down")], "; so it is", left=3)
    nobody = Decision.by("score", POLICIES["score"], ask, (), (), None, [("m:1", "is down")], "nobody may")
    record.decisions = [chosen, nobody]
    for again, made in zip(read_again(record)["decisions"], record.decisions, strict=True):
        features = [candidate.pop("features") for candidate in again["candidates"] if "cost" in candidate]
        assert [Features.from_row(row) for row in features] == list(made.rows)
        assert AskFeatures.from_row(again.pop("ask")) == ask
        assert again.pop("unseen", 0) == made.left
        assert (again["policy"], again["node"], again["reason"]) == (made.policy, made.node, made.reason)
        for row, candidate in zip(again["candidates"], made.candidates, strict=True):
            assert (row["node"], row.get("excluded")) == (candidate.node, candidate.excluded)
            if not candidate.excluded:
                assert row["cost"] == pytest.approx(candidate.cost, abs=1e-6)
                assert row["terms"] == pytest.approx(candidate.terms, abs=1e-6)
                assert tuple(row["notes"]) == candidate.notes


@pytest.mark.parametrize(
    ("name", "value"), [("policy", "of another version"), ("costs", [1.0]), ("rows", [[1]])]
)
def test_what_is_damaged_or_of_a_version_to_come_is_said_or_left_bare(name: str, value: Any) -> None:
    record, ask = finished("a"), AskFeatures()
    rows, how = [Features("n:1"), Features("m:1", success_rate=0.5)], POLICIES["finish_time"]
    record.decisions = [Decision.by("finish_time", how, ask, rows, [0.0, 1.0], 0)]
    packed = orjson.loads(orjson.dumps(pack(record, NOON)))
    packed["decisions"][0][name] = value
    if name == "policy":
        (decision,) = unpack(packed, CURRENT)["decisions"]
        assert [(c["cost"], c["terms"]) for c in decision["candidates"]] == [(0.0, {}), (1.0, {})]
    else:
        with pytest.raises(ValueError, match="not an entry of the journal"):
            unpack(packed, CURRENT)


def test_what_is_infinite_or_missing_costs_no_entry() -> None:
    record = finished("a")
    costs = [Candidate("n:1", cost=float("inf"), terms={"a_s": 1.5, "b_s": float("nan")})]
    costs += [Candidate("m:1", cost=1e300, terms={"b_s": 2.5}), Candidate("o:1", cost=3.25)]
    record.decisions = [Decision("score", "n:1", costs, "so it is")]
    first, second, third = read_again(record)["decisions"][0]["candidates"]
    assert (first["cost"], first["terms"]) == (None, {"a_s": 1.5})
    assert (second["cost"], second["terms"]) == (1e300, {"b_s": 2.5})
    assert (third["cost"], third["terms"]) == (3.25, {})


def test_the_client_s_own_name_stands_before_its_address() -> None:
    record = finished("a")
    assert record.ask is not None
    record.ask.client = "nightly"
    assert read_again(record)["client"] == "nightly"


def test_an_entry_of_a_large_fleet_keeps_the_chosen_and_the_cheapest() -> None:
    record = finished("a", 1000)
    record.decisions = [Decision("score", "n999:1", record.decisions[0].candidates, "so it is")]
    decision = read_again(record)["decisions"][0]
    assert [c["node"] for c in decision["candidates"][:3]] == ["n999:1", "n0:1", "n1:1"]
    assert len(decision["candidates"]) == CANDIDATES
    assert decision["candidates_left_out"] == 1001 - CANDIDATES


def test_a_line_is_read_by_the_columns_that_it_was_written_under() -> None:
    line = {
        "id": "x",
        "decisions": [
            {"ask": [9], "terms": ["t"], "candidates": [["n:1", [1.5, 2.5], [], [7, 8]], ["m:1", "is down"]]}
        ],
    }
    (decision,) = unpack(line, Columns(("prompt_tokens",), ("turn", "of_old")))["decisions"]
    assert decision["ask"] == {"prompt_tokens": 9}
    assert decision["candidates"][0]["features"] == {"node": "n:1", "turn": 7, "of_old": 8, "notes": []}
    assert Features.from_row(decision["candidates"][0]["features"]) == Features("n:1", turn=7)
    with pytest.raises(ValueError, match="not an entry of the journal"):
        unpack(line, CURRENT)


OLD = {
    "id": "old",
    "decisions": [
        {
            "policy": "finish_time",
            "node": "n:1",
            "reason": "n:1 is first",
            "candidates": [
                {"node": "n:1", "cost": 1.0, "terms": {"decode_s": 1.0}, "notes": []},
                {"node": "m:1", "excluded": "is down"},
            ],
        }
    ],
}


async def test_what_earlier_versions_and_a_crash_have_left(tmp_path: Path) -> None:
    lines = [
        orjson.dumps(OLD),
        b"[1]",
        b"7",
        b'{"x": 1}',
        b'{"id": 3, "decisions": []}',
        b"\xff",
        b'{"id": "cut',
    ]
    (tmp_path / "requests.jsonl").write_bytes(b"\n".join(lines))
    for name in ("new", "newer"):  # the first one's header may not end the line that was cut
        journal = Journal(tmp_path, clock=lambda: NOON)
        journal.add(finished(name))
        await journal.close()
    again = Journal(tmp_path)
    assert [made["id"] for made in again.recent(9)] == ["newer", "new", "old"]
    assert again.get("old") == OLD
    assert again.get("new") == read_again(finished("new"))
    await again.close()


async def test_a_line_that_nobody_understands_is_shown_as_it_is(tmp_path: Path) -> None:
    broken = {"id": "x", "decisions": [{"candidates": [["n", [1, 2], [], [3]]]}], "shard_plan": []}
    (tmp_path / "requests.jsonl").write_bytes(orjson.dumps(HEADER) + b"\n" + orjson.dumps(broken))
    journal = Journal(tmp_path)
    assert journal.get("x") == broken
    await journal.close()


async def test_memory_holds_the_last_ones(tmp_path: Path) -> None:
    journal = Journal(tmp_path, in_memory=3)
    for name in "abcde":
        journal.add(finished(name))
    assert [made["id"] for made in journal.recent(10)] == ["e", "d", "c"]
    assert [made["id"] for made in journal.recent(2)] == ["e", "d"]
    assert journal.get("b") is None
    found = journal.get("c")
    assert found is not None
    assert found["id"] == "c"
    await journal.close()


async def test_only_requests_for_ollama_are_kept_and_only_placed_ones_are_decisions(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(Record("m", "native", 0.0, ""))  # /metrics
    unplaced = Record("t", "native", 0.0, "", match("/api/tags"))
    journal.add(unplaced)
    assert journal.get("m") is None
    assert journal.get("t") is not None
    assert journal.recent(9) == []
    await journal.close()


async def test_notes_stand_beside_the_requests_and_survive_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path, clock=lambda: NOON)
    first = journal.note("action", {"does": "load", "model": "gemma3", "node": "n:1", "reason": "it is hot"})
    journal.note("probe", {"node": "m:1"})
    second = journal.note("action", {"does": "unload"})
    journal.add(finished("a"))
    await journal.close()
    again = Journal(tmp_path)
    assert [note["id"] for note in again.noted("action", 9)] == [second, first]
    assert [note["id"] for note in again.noted("action", 1)] == [second]
    assert again.get(first) == {
        "note": "action",
        "id": first,
        "at": "2026-08-01T12:00:00.000+00:00",
        "data": {"does": "load", "model": "gemma3", "node": "n:1", "reason": "it is hot"},
    }
    assert [made["id"] for made in again.recent(9)] == ["a"]
    await again.close()


def test_no_line_is_missed_or_read_twice_where_the_file_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, previous = tmp_path / "requests.jsonl", tmp_path / "requests.1.jsonl"
    previous.write_bytes(orjson.dumps({"id": "a"}) + b"\n")
    path.write_bytes(orjson.dumps({"id": "b"}) + b"\n" + orjson.dumps({"id": "c"}) + b"\n")
    assert ids(tmp_path) == ["a", "b", "c"]
    opened = Path.open

    def replaced_once_it_was_opened(self: Path, mode: str) -> Any:
        file = opened(self, mode)
        if self == path:
            path.replace(previous)
        return file

    monkeypatch.setattr(Path, "open", replaced_once_it_was_opened)
    assert ids(tmp_path) == ["b", "c"]


async def test_the_disk_is_bounded_and_survives_a_restart(tmp_path: Path) -> None:
    head_bytes = len(orjson.dumps(HEADER)) + 1
    one_bytes = len(orjson.dumps(pack(finished("a0"), NOON))) + 1
    journal = Journal(tmp_path, file_bytes=head_bytes + 3 * one_bytes, clock=lambda: NOON)
    for number in range(10):
        journal.add(finished(f"a{number}"))
        journal.file.flush()
        await journal.file.written()
    await journal.close()
    assert journal.lost == 0
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {
        "requests.jsonl": head_bytes + one_bytes,
        "requests.1.jsonl": head_bytes + 3 * one_bytes,
    }
    again = Journal(tmp_path)
    assert [made["id"] for made in again.recent(9)] == ["a9", "a8", "a7", "a6"]
    assert again.get("a6") == read_again(finished("a6"))
    await again.close()


async def test_a_disk_that_hangs_costs_the_oldest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line_bytes = len(orjson.dumps(pack(finished("a0"), NOON))) + 1
    monkeypatch.setattr(ring_file, "UNWRITTEN_BYTES", 3 * line_bytes)
    journal = Journal(tmp_path, clock=lambda: NOON)
    goes_on = threading.Event()
    journal.file._writer.submit(goes_on.wait)
    for number in range(5):
        journal.add(finished(f"a{number}"))
    goes_on.set()
    await journal.close()
    assert journal.lost == 2
    assert ids(tmp_path) == ["a2", "a3", "a4"]


async def test_a_disk_that_refuses_costs_only_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "journal").write_text("a file where the directory should be")
    journal = Journal(tmp_path / "journal")
    journal.add(finished("a"))
    await journal.close()
    assert journal.get("a") is not None
    assert journal.lost == 1
    assert "requests.jsonl cannot be written: " in caplog.text
    assert "the journal cannot be read: " in caplog.text


async def test_what_is_kept_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    """What orjson returns has room for 8 KB and more, whatever it says of its size."""
    journal = Journal(tmp_path, clock=lambda: NOON)
    journal.add(finished("warm"))
    lines_bytes = 200 * len(orjson.dumps(pack(finished("a0"), NOON)))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(200):
            journal.add(finished(f"a{number}"))
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < 2 * lines_bytes
    await journal.close()
