"""Replay: recorded choices made again, by hand for small cases and on the real proxy under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from typer.testing import CliRunner, Result

from agent.report import Model
from proxy_addon import cli
from proxy_addon.ask import Ask
from proxy_addon.commands.replay import Mistake, moment
from proxy_addon.endpoints import ENDPOINTS
from proxy_addon.entry import CANDIDATES, CURRENT, pack, unpack
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.features import AskFeatures, Features
from proxy_addon.placement.policies import decide
from proxy_addon.record import Record
from proxy_addon.replay import Again, Other, moves, replay, summaries
from tests.fakes.faults import named
from tests.fakes.ollama_node import FakeModel, FakeOllama
from tests.fakes.store import GIB
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy

NOW = datetime(2026, 8, 1, 12, 0, 0, tzinfo=UTC)
POLICIES = ("finish_time", "score", "least_loaded", "round_robin")
CHAT = next(endpoint for endpoint in ENDPOINTS if endpoint.path == "/api/chat")


def big(**known: Any) -> Features:
    """Waits 0.5 s, then works 0.1 s on the prompt and 1 s on the answer of :func:`wants`."""
    return Features(
        "big:1", wait_s=0.5, s_per_prompt_token=0.001, s_per_output_token=0.005, turn=9, in_flight=2, **known
    )


def small(**known: Any) -> Features:
    """Works 0.2 s on the prompt and 2 s on the answer, at once; 2.2 s."""
    return Features("small:1", s_per_prompt_token=0.002, s_per_output_token=0.01, turn=3, **known)


def wants(**known: Any) -> AskFeatures:
    return AskFeatures(prompt_tokens=100.0, output_tokens=200.0, output_tokens_high=200.0, **known)


def decision(
    node: str | None,
    rows: Sequence[Features] = (),
    asked: AskFeatures | None = None,
    policy: str = "finish_time",
) -> dict[str, Any]:
    """As the journal gives it."""
    candidates: list[dict[str, Any]] = [{"node": "down:1", "excluded": "is down"}]
    candidates += [{"node": row.node, "cost": 0.0, "terms": {}, "features": row.as_row()} for row in rows]
    return {"policy": policy, "node": node, "candidates": candidates, "ask": (asked or wants()).as_row()}


def entry(name: str, *decisions: dict[str, Any], model: str = "gemma3") -> dict[str, Any]:
    at = (NOW - timedelta(minutes=1)).isoformat()
    return {"id": name, "at": at, "client": "::1", "model": model, "decisions": list(decisions)}


def again(entries: Sequence[dict[str, Any]], other: Other = Other()) -> list[Again]:  # noqa: B008  # frozen
    return replay(entries, other).again


def test_a_choice_by_hand_under_another_policy() -> None:
    recorded = [entry("a", decision("big:1", [big(), small()]))]
    [same] = again(recorded)
    assert (same.before, same.after, same.moved) == ("big:1", "big:1", False)
    assert same.before_s == same.after_s == pytest.approx(1.6)
    [other] = again(recorded, Other("round_robin"))  # the smallest turn
    assert (other.id, other.decision, other.model) == ("a", 1, "gemma3:latest")
    assert (other.before, other.after, other.moved) == ("big:1", "small:1", True)
    assert (other.before_s, other.after_s) == (pytest.approx(1.6), pytest.approx(2.2))
    [other] = again(recorded, Other("least_loaded"))
    assert other.after == "small:1"


def test_a_policy_that_counts_no_seconds_is_asked_among_those_with_a_slot_free() -> None:
    waits = big()
    waits.turn = 1
    recorded = [entry("a", decision("small:1", [waits, small()]))]
    assert [each.after for each in again(recorded, Other("round_robin", ahead_s=0.05))] == ["small:1"]
    assert [each.after for each in again(recorded, Other("round_robin", ahead_s=0.5))] == ["big:1"]
    both = small(wait_s=2.0)
    recorded = [entry("a", decision("big:1", [waits, both]))]
    assert [each.after for each in again(recorded, Other("round_robin", ahead_s=0.05))] == ["big:1"]
    # What was chosen so is chosen again, whatever it waited for: requests that only load stand in no line.
    recorded = [entry("a", decision("big:1", [waits, small()], policy="round_robin"))]
    assert [each.after for each in again(recorded, Other(ahead_s=0.05))] == ["big:1"]


def test_the_score_s_own_factors_decide() -> None:
    near, far = big(poll_latency_s=0.0), small(poll_latency_s=0.5)
    recorded = [entry("a", decision("far", [near, far])), entry("b", decision("small:1", [near, far]))]
    [other] = again(recorded, Other("score"))
    # 100 ÷ 1 ÷ (1 + 2 in flight) = 33.3 beside 100 ÷ 1.5 = 66.7
    assert (other.id, other.after) == ("b", "small:1")
    idle = big(poll_latency_s=0.0)
    idle.in_flight, idle.wait_s = 0, 0.0
    [other] = again([entry("b", decision("small:1", [idle, far]))], Other("score"))
    assert other.after == "big:1"


def test_nodes_that_are_set_to_do_a_kind() -> None:
    asked = wants(kind="embedding", specialise_factor=2.0)
    recorded = [entry("a", decision("big:1", [big(), small()], asked))]
    there = {"embedding": ("small:1",)}
    # 2 × 1.6 s there, 2.2 s here
    assert [each.after for each in again(recorded, Other(specialise=there))] == ["small:1"]
    # 1.2 × 1.6 s there
    assert [each.after for each in again(recorded, Other(specialise=there, specialise_factor=1.2))] == [
        "big:1"
    ]
    for beside in ({"embedding": ("gone:1",)}, {"generation": ("small:1",)}, {"embedding": ()}):
        assert [each.after for each in again(recorded, Other(specialise=beside))] == ["big:1"]
    outside = [entry("a", decision("small:1", [big(outside=True), small()], asked))]
    assert [each.after for each in again(outside)] == ["small:1"]
    assert [each.after for each in again(outside, Other(specialise={"embedding": ()}))] == ["big:1"]
    assert [each.after for each in again(outside, Other(specialise_factor=1.2))] == ["big:1"]


def test_what_cannot_be_made_again_is_counted() -> None:
    bare = decision("big:1", [big()])
    bare["candidates"][1].pop("features")  # as earlier versions wrote it
    unknown = decision("big:1", [big()], policy="of_tomorrow")
    many = decision("big:1", [big()]) | {"unseen": 7}
    nulls = decision("big:1", [big()])
    nulls["candidates"][1]["features"]["wait_s"] = None
    done = replay(
        [
            entry("a", bare, many),
            entry("b", decision(None), unknown, {"node": "big:1"}, nulls),
            entry("c", decision(None)),
            {"id": "d", "decisions": [decision("big:1", [big()])]},
        ],
        Other(),
    )
    assert [(each.id, each.decision) for each in done.again] == [("a", 2)]
    assert (done.requests, done.bare, done.partial) == (3, 5, 1)


def test_sums_by_model() -> None:
    recorded = [
        entry("a", decision("big:1", [big(), small()])),
        entry("b", decision("small:1", [small()])),
        entry("c", decision("big:1", [big()]), model="other"),
    ]
    found = again(recorded, Other("round_robin"))
    every, gemma, other = summaries(found)
    assert (every.model, every.placed, every.moved) == (None, 3, 1)
    assert (gemma.model, gemma.placed, gemma.moved) == ("gemma3:latest", 2, 1)
    assert (other.model, other.placed, other.moved) == ("other:latest", 1, 0)
    assert (gemma.mean_before_s, gemma.mean_after_s) == (pytest.approx(1.9), pytest.approx(2.2))
    assert (every.p99_before_s, every.p99_after_s) == (pytest.approx(2.2), pytest.approx(2.2))
    assert (other.p99_before_s, other.mean_after_s) == (pytest.approx(1.6), pytest.approx(1.6))
    assert moves(found) == [("big:1", "small:1", 1)]


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("45s", NOW - timedelta(seconds=45)),
        ("30m", NOW - timedelta(minutes=30)),
        ("1.5h", NOW - timedelta(minutes=90)),
        (" 2 d ", NOW - timedelta(days=2)),
        ("2026-08-01T10:00:00+02:00", NOW - timedelta(hours=4)),
        ("2026-08-01T10:00Z", NOW - timedelta(hours=2)),
        ("2026-07-31", datetime.fromisoformat("2026-07-31").astimezone(UTC)),  # of this machine's clock
    ],
)
def test_moments(text: str, when: datetime) -> None:
    assert moment("--since", text, NOW) == when


@pytest.mark.parametrize(
    "text", ["", "h", "1", "-1h", "1w", "yesterday", "2026-13-01", "9" * 400 + "d", "nan"]
)
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(Mistake) as told:
        moment("--since", text, NOW)
    assert str(told.value).startswith("--since ")
    assert "\n" not in str(told.value)


# the command


def run(*args: str, **env: str) -> Result:
    return CliRunner().invoke(cli.app, ("replay", *args), env=env, prog_name="sollol")


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with three recorded requests of a minute ago, two before that, and what is no request."""
    minute_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    lines: list[dict[str, Any]] = [
        {"columns": {"ask": list(CURRENT.ask), "node": list(CURRENT.node)}},
        entry("old", decision("small:1", [small()])) | {"at": "2020-01-01T00:00:00.000+00:00"},
        entry("never", decision("small:1", [small()])) | {"at": None},
        entry("a", decision("big:1", [big(), small()])) | {"at": minute_ago},
        entry("b", decision("big:1", [big(), small()]), model="Other:7b") | {"at": minute_ago},
        entry("c", decision("small:1", [small()])) | {"at": minute_ago, "client": "nightly"},
        {"id": "d", "decisions": [{"candidates": [[1]]}], "at": minute_ago},
        {"note": "action", "id": "n", "at": minute_ago, "data": {}},
    ]
    (tmp_path / "state" / "journal").mkdir(parents=True)
    written = b"\n".join(orjson.dumps(line) for line in lines)
    (tmp_path / "state" / "journal" / "requests.jsonl").write_bytes(written)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def in_json(*args: str) -> dict[str, Any]:
    shown = run("--json", *args)
    assert shown.exit_code == 0, shown.output
    found: dict[str, Any] = orjson.loads(shown.output)
    return found


def test_the_command_says_what_would_have_changed(state_dir: Path) -> None:
    shown = run("--state-dir", str(state_dir), "--set", "placement=round_robin", "--limit", "1")
    assert shown.exit_code == 0, shown.output
    lines = [line.rstrip() for line in shown.output.splitlines()]
    assert lines[0].startswith(
        "2 of 3 choices would have been others under placement=round_robin (3 requests, "
    )
    rows = [" ".join(line.split()) for line in lines]
    at = rows.index("MODEL PLACED ELSEWHERE MEAN BEFORE AFTER P99 BEFORE AFTER")
    assert rows[at + 1] == "all 3 2 1.8 s 2.2 s 2.2 s 2.2 s"
    assert rows[at + 2] == "gemma3:latest 2 1 1.9 s 2.2 s 2.2 s 2.2 s"
    assert rows[at + 3] == "Other:7b 1 1 1.6 s 2.2 s 1.6 s 2.2 s"
    assert "big:1 small:1 2" in rows
    at = rows.index("ID AT MODEL FROM TO EXPECTED BEFORE AFTER")
    assert rows[at + 1].startswith("b ")  # the newest first
    assert rows[at + 1].endswith(" Other:7b big:1 small:1 1.6 s 2.2 s")
    assert lines[lines.index("and 1 more") - 1].startswith("b ")
    assert "Each choice is made again from what was known then: had requests gone elsewhere" in lines[-1]


def test_without_a_change_nothing_changes(state_dir: Path) -> None:
    shown = run("--state-dir", str(state_dir))
    assert shown.output.startswith("0 of 3 choices would have been others under the settings of the time (")
    assert "FROM" not in shown.output


def test_which_requests(state_dir: Path) -> None:
    there = ("--state-dir", str(state_dir), "--set", "placement=round_robin")

    def chosen(*args: str) -> tuple[int, list[str]]:
        found = in_json(*there, *args)
        return found["requests"], [each["id"] for each in found["changed"]]

    assert chosen() == (3, ["a", "b"])
    assert chosen("--since", "2019-12-31") == (4, ["a", "b"])
    assert chosen("--since", "2019-12-31", "--until", "2020-01-02") == (1, [])
    assert chosen("--model", "gemma3:latest") == (2, ["a"])
    assert chosen("--model", "other:7b") == (1, ["b"])
    assert chosen("--client", "nightly") == (1, [])


def test_a_setting_of_one_kind_leaves_the_others_as_they_were(state_dir: Path) -> None:
    (state_dir.parent / "sollol.yaml").write_text(
        f"state_dir: {state_dir}\nplacement: round_robin\nspecialise: {{generation: [small:1]}}\n"
    )
    assert in_json()["changed"] == []  # the file says where the journal is, not what to change
    found = in_json("--set", "specialise.generation=small:1", "--set", "specialise_factor=3")
    assert [(each["id"], each["after"]) for each in found["changed"]] == [("a", "small:1"), ("b", "small:1")]
    assert in_json("--set", "specialise.embedding=small:1", "--set", "specialise_factor=3")["changed"] == []


@pytest.mark.parametrize(
    ("args", "status", "sentence"),
    [
        (
            ("--since", "soon"),
            2,
            "--since should be 30m, 1h, 2d or a time such as 2026-08-01T12:00, not 'soon'",
        ),
        (("--until", "x"), 2, "--until should be 30m, 1h, 2d or a time such as 2026-08-01T12:00, not 'x'"),
        (("--since", "1h", "--until", "2h"), 2, "--since 1h is not before --until 2h"),
        (("--since", "3000-01-01"), 2, "--since 3000-01-01 is not before now"),
        (("--set", "placement=best"), 2, "--set placement: placement should be 'finish_time', "),
        (("--set", "placement"), 2, "--set placement: expected key=value, such as timeouts.connect_s=5"),
        (("--set", "specialise.poetry=a"), 2, "--set specialise.poetry: specialise.poetry"),
        (
            ("--set", "retry.rounds=2"),
            2,
            "retry has no influence on a choice among the recorded candidates;"
            " placement, specialise, specialise_factor have",
        ),
        (("--model", "a b"), 2, "--model: "),
        (("--config", "none.yaml"), 2, "none.yaml: cannot be read: No such file or directory"),
        (("--client", "nobody"), 1, "no such request was placed, says "),
        (("--state-dir", "elsewhere"), 1, "there is no journal in elsewhere/journal: name the proxy's "),
        (("--url", "http://"), 1, "http:// is not the URL of a proxy"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    state_dir: Path, args: tuple[str, ...], status: int, sentence: str
) -> None:
    shown = run(*(() if "--state-dir" in args else ("--state-dir", str(state_dir))), *args)
    assert shown.exit_code == status, shown.output
    assert shown.output.startswith(f"sollol replay: {sentence}")
    assert shown.output.count("\n") == 1


def test_a_journal_of_an_earlier_version_is_told(tmp_path: Path) -> None:
    old = decision("n:1", [Features("n:1")])
    del old["ask"], old["candidates"][1]["features"]
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "requests.jsonl").write_bytes(
        orjson.dumps(entry("a", old) | {"at": datetime.now(UTC).isoformat()})
    )
    shown = run("--state-dir", str(tmp_path), "--since", "1d")
    assert (shown.exit_code, shown.output) == (
        1,
        f"sollol replay: no decision in {tmp_path / 'journal'} says what it was made of:"
        " an earlier version wrote all 1\n",
    )


def test_a_large_fleet_is_replayed_as_far_as_it_was_looked_at() -> None:
    """With real decisions of a fleet of which only a part is worked out and kept."""
    rng = random.Random(7)
    fleet, speeds = Fleet(), Speeds()
    for index in range(200):
        node = fleet.add(Node("10.0.0.1", 1000 + index))
        node.polled_s = 1.0
        node.models["m:latest"] = Model(name="m", size=rng.randrange(1, 9) * GIB, digest="d", modified_at=NOW)
        node.priority = rng.randrange(1, 11)
        for _ in range(rng.randrange(3)):
            node.take(Ask(CHAT, "m", "m:latest"), 0.5, rng.random() * 9)

    def recorded(policy: str) -> dict[str, Any]:
        made = Record("a", "native", 0.0, "", CHAT, Ask(CHAT, "m", "m:latest", prompt_tokens=99), ended_s=2.0)
        made.decisions = [decide(made.ask, fleet, speeds, 1.0, policy)] if made.ask else []
        return unpack(orjson.loads(orjson.dumps(pack(made, NOW))), CURRENT)

    for policy in POLICIES:
        entry_ = recorded(policy)
        assert len(entry_["decisions"][0]["candidates"]) <= CANDIDATES
        done = replay([entry_], Other())
        assert [(each.moved, each.before_s) for each in done.again] == [(False, done.again[0].after_s)]
        assert done.partial == 1


# the real proxy

MODELS = [FakeModel("llama3.2", size=2 * GIB), FakeModel("gemma3", size=3 * GIB)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_what_a_proxy_chose_under_load_is_chosen_again(policy: str, tmp_path: Path) -> None:
    """Unlike nodes, loads, failures, queues: each choice comes out the same, and others under others."""
    speeds = (400.0, 100.0, 50.0)
    nodes = [
        await FakeOllama(models=MODELS, decode_tok_s=speed, num_parallel=2, time_scale=0.02).start()
        for speed in speeds
    ]
    nodes[0].fail(named("busy", path="/api/chat", times=3))
    every = asyncio.Semaphore(8)
    async with RunningProxy(nodes, placement=policy, state_dir=tmp_path) as proxy:
        async with aiohttp.ClientSession() as session:

            async def one(number: int) -> None:
                prompt = f"[[id:r{number}]] [[n:{number % 7 + 2}]] hi"
                async with every:
                    model = MODELS[number % 2].name
                    heard = await ask(session, proxy.url, BY_NAME["chat"], prompt, model=model)
                check_stream(heard.text, prompt)

            await asyncio.gather(*(one(number) for number in range(40)))
        asked = await asyncio.to_thread(in_json, "--url", proxy.url)
    for node in nodes:
        await node.stop()
    found = await asyncio.to_thread(in_json, "--state-dir", str(tmp_path))
    assert (found["requests"], found["passed_over"], found["changed"]) == (40, 0, [])
    assert found["summaries"][0]["placed"] >= 40
    assert asked == found
    moved = 0
    for other in POLICIES:
        there = ("--state-dir", str(tmp_path), "--set", f"placement={other}")
        moved += len((await asyncio.to_thread(in_json, *there))["changed"])
    assert moved > 0
