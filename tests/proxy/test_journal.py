"""The journal: what an entry says, and that neither memory nor disk grows without bound."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from proxy_addon.ask import Ask
from proxy_addon.endpoints import Endpoint, match
from proxy_addon.journal import CANDIDATES, Journal, entry
from proxy_addon.placement.decision import Candidate, Decision
from proxy_addon.record import Attempt, FinalStats, Record

NOON = datetime(2026, 8, 1, 12, 0, 0, tzinfo=UTC)


def chat() -> Endpoint:
    endpoint = match("/api/chat")
    assert endpoint is not None
    return endpoint


def finished(name: str, candidates: int = 2) -> Record:
    rows = tuple(Candidate(f"n{i}:1", cost=float(i), terms={"decode_s": float(i)}) for i in range(candidates))
    record = Record(name, "native", 100.0, "10.0.0.9", chat())
    record.ask = Ask(chat(), "gemma3", "gemma3:latest", body={"messages": [{"content": "a secret"}]})
    record.decisions = [Decision("finish_time", "n1:1", rows, "n1:1 finishes first")]
    record.attempts = [Attempt("n0:1", 100.5, 101.0, "died", "reset"), Attempt("n1:1", 101.0, 104.0, "ok")]
    record.first_byte_s, record.ended_s = 102.0, 104.0
    record.stats = FinalStats(output_tokens=7)
    record.outcome, record.status = "ok", 200
    return record


def test_an_entry_tells_the_whole_way() -> None:
    made = entry(finished("a"), NOON)
    assert made["at"] == "2026-08-01T11:59:56.000+00:00"
    assert (made["duration_s"], made["first_byte_s"]) == (4.0, 2.0)
    assert (made["path"], made["model"], made["node"]) == ("/api/chat", "gemma3", "n1:1")
    assert made["attempts"][0] == {
        "node": "n0:1",
        "started_s": 0.5,
        "ended_s": 1.0,
        "outcome": "died",
        "detail": "reset",
    }
    assert made["decisions"][0]["candidates"][1]["terms"] == {"decode_s": 1.0}
    assert made["stats"]["output_tokens"] == 7
    assert b"secret" not in orjson.dumps(made)


def test_an_entry_of_a_large_fleet_keeps_the_chosen_and_the_cheapest() -> None:
    record = finished("a", 1000)
    record.decisions = [Decision("score", "n999:1", record.decisions[0].candidates, "so it is")]
    decision = entry(record, NOON)["decisions"][0]
    assert [c["node"] for c in decision["candidates"][:3]] == ["n999:1", "n0:1", "n1:1"]
    assert len(decision["candidates"]) == CANDIDATES
    assert decision["candidates_left_out"] == 1000 - CANDIDATES


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


async def test_the_disk_is_bounded_and_survives_a_restart(tmp_path: Path) -> None:
    one_bytes = len(orjson.dumps(entry(finished("a0"), NOON))) + 1
    for number in range(10):
        journal = Journal(tmp_path, file_bytes=3 * one_bytes, clock=lambda: NOON)
        journal.add(finished(f"a{number}"))
        await journal.close()
    assert journal.lost == 0
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {"requests.jsonl": one_bytes, "requests.1.jsonl": 3 * one_bytes}
    with (tmp_path / "requests.jsonl").open("ab") as file:
        file.write(b'{"id": "cut')  # a crash in mid-line
    again = Journal(tmp_path)
    assert [made["id"] for made in again.recent(9)] == ["a9", "a8", "a7", "a6"]
    await again.close()


async def test_a_disk_that_refuses_costs_only_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "journal").write_text("a file where the directory should be")
    journal = Journal(tmp_path / "journal")
    journal.add(finished("a"))
    await journal.close()
    assert journal.get("a") is not None
    assert journal.lost == 1
    assert "the journal cannot be written" in caplog.text
