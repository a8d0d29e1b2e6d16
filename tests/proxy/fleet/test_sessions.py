"""Which runner Ollama drives out next: pure functions, then against a node that does it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from agent.ollama import names
from agent.report import Resident
from proxy_addon.fleet.sessions import ALIKE_S, DEFAULT_S, Session, as_evicted, followed
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import GIB, FakeModel
from tests.proxy.fleet.conftest import WatchFactory, until

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
FOREVER = datetime(2318, 1, 1, tzinfo=UTC)
MODELS = [FakeModel(name, size=GIB) for name in "abcd"]


def at(second: float) -> datetime:
    return NOON + timedelta(seconds=second)


def runner(expires_at: datetime | None, digest: str = "") -> Resident:
    return Resident(name="m", size=1, expires_at=expires_at, digest=digest)


def test_what_is_left_just_after_a_use_is_the_keep_alive() -> None:
    rows = {"m": runner(at(60))}
    known = followed({}, {}, rows, {}, NOON, first=False)
    assert known["m"].length_s == 60
    idle = followed(known, rows, {"m": runner(at(60))}, {}, at(40), first=False)
    assert idle["m"].length_s == 60
    used = followed(idle, rows, {"m": runner(at(650))}, {}, at(50), first=False)
    assert used["m"].length_s == 600


def test_at_the_first_look_a_runner_has_the_default_or_what_is_left() -> None:
    rows = {"idle": runner(at(20)), "long": runner(at(900)), "untold": runner(None), "ever": runner(FOREVER)}
    known = followed({}, {}, rows, {}, NOON, first=True)
    assert {key: known[key].length_s for key in ("idle", "long", "untold")} == {
        "idle": DEFAULT_S,
        "long": 900,
        "untold": DEFAULT_S,
    }
    assert as_evicted(known, known)[-1] == "ever"


def test_a_model_that_went_and_came_back_is_a_new_runner() -> None:
    rows = {"m": runner(at(600))}
    known = followed({}, {}, rows, {}, NOON, first=False)
    gone = followed(known, rows, {}, {}, at(5), first=False)
    assert gone == {}
    assert followed(gone, {}, {"m": runner(at(70))}, {}, at(10), first=False)["m"].length_s == 60


def test_equals_go_by_their_blobs_which_may_become_known_later() -> None:
    rows = {"a": runner(at(300), "one"), "b": runner(at(300), "two")}
    known = followed({}, {}, rows, {}, NOON, first=False)
    assert as_evicted(rows, known) == ["a", "b"]
    told = followed(known, rows, rows, {"one": "f0", "two": "0f"}, at(9), first=False)
    assert as_evicted(rows, told) == ["b", "a"]


def test_sessions_are_as_long_as_they_look_within_what_a_poll_may_be_late() -> None:
    sessions = {"a": Session(300, "2"), "b": Session(300 - ALIKE_S, "3"), "c": Session(299, "1")}
    assert as_evicted(sessions, sessions) == ["c", "a", "b"]
    sessions["b"] = Session(299 - 2 * ALIKE_S, "3")
    assert as_evicted(sessions, sessions) == ["b", "c", "a"]
    assert as_evicted(["b", "new"], sessions) == ["b", "new"]  # of which nothing is known: the default


async def load(fake: FakeOllama, session: aiohttp.ClientSession, name: str, keep_alive: str) -> None:
    body = {"model": name, "prompt": "[[n:1]]", "stream": False, "keep_alive": keep_alive}
    async with session.post(f"{fake.url}/api/generate", json=body) as answer:
        assert answer.status == 200, await answer.text()


@pytest.mark.parametrize(
    ("keeps", "watched_since"),
    [
        (("10m", "1m", "5m"), "before"),
        (("5m", "5m", "5m"), "before"),
        (("30s", "-1m", "1h"), "before"),
        (("5m", "5m", "5m"), "after"),
        (("5m", "1h", "-1m"), "after"),
    ],
)
async def test_a_node_drives_out_whom_it_was_expected_to(
    ollama_node: NodeFactory, watched: WatchFactory, keeps: tuple[str, ...], watched_since: str
) -> None:
    fake = await ollama_node(MODELS, max_loaded_models=3, vram_bytes=64 * GIB, default_num_ctx=4096)
    found = watched(fake) if watched_since == "before" else None
    # Who was used longest ago must not be whose blob comes first.
    in_use = sorted(MODELS[:3], key=lambda model: model.blob, reverse=True)
    async with aiohttp.ClientSession() as session:
        for model, keep_alive in zip(in_use, keeps, strict=True):
            await load(fake, session, model.name, keep_alive)
        found = found or watched(fake)
        (node,) = found.fleet
        await until(lambda: len(node.sessions) == 3 and all(s.blob for s in node.sessions.values()))
        first = as_evicted(node.resident, node.sessions)[0]
        await load(fake, session, "d", "5m")
    assert [names.canonical(name) for name in fake.scheduler.unloads] == [first]
