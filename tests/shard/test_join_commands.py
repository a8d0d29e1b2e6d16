"""`sollol shard init` and `sollol shard join`, as a person meets them."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import Result
from typer.testing import CliRunner

from agent import join, pki
from shard.cli import app

TOKEN = re.compile(r"sollol-[0-9a-f]{8}-\S+")


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))


async def site(*routes: web.RouteDef) -> tuple[web.AppRunner, str]:
    server = web.Application()
    server.add_routes(routes)
    runner = web.AppRunner(server, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
def head(tmp_path: Path) -> str:
    return str(tmp_path / "head")


@pytest.fixture
async def url(head: str) -> AsyncIterator[str]:
    """Where the service of ``head`` takes others in."""
    runner, url = await site(web.post(join.PATH, join.handler(Path(head))))
    yield url
    await runner.cleanup()


async def token(head: str, url: str, *more: str) -> str:
    ran = await run("init", "--state-dir", head, "--name", "head", "--url", url, *more)
    assert ran.exit_code == 0, ran.output
    return TOKEN.findall(ran.output)[0]


async def test_init_founds_once_and_prints_what_to_run(head: str, url: str) -> None:
    ran = await run("init", "--state-dir", head, "--name", "head", "--url", url)
    founded, *rest = ran.output.splitlines()
    assert founded == f"founded a fleet in {head}/fleet, with head as coordinator"
    assert rest[2] == f"  sollol agent join {url} {TOKEN.findall(ran.output)[0]}"
    assert "But " not in ran.output
    authority = pki.authority(Path(head))
    again = await run("init", "--state-dir", head, "--url", url, "--for", "coordinator")
    assert "founded" not in again.output
    assert f"  sollol shard join {url} sollol-" in again.output
    assert pki.authority(Path(head)) == authority


async def test_init_names_an_address_that_others_reach(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.announce.likely_address", lambda: "127.0.0.9")
    monkeypatch.setattr("shard.cli.DEFAULT_PORT", 9)
    ran = await run("init", "--state-dir", head)
    assert "  sollol agent join http://127.0.0.9:9 sollol-" in ran.output
    last = ran.output.splitlines()[-1]
    assert last.startswith("But nobody answers at http://127.0.0.9:9 yet: first start `sollol shard serve`")


async def test_init_tells_of_a_server_that_knows_of_no_fleet_yet(head: str) -> None:
    runner, url = await site()
    ran = await run("init", "--state-dir", head, "--url", url)
    await runner.cleanup()
    assert ran.output.splitlines()[-1].startswith(f"But what answers at {url} takes nobody in yet: ")


async def test_a_second_coordinator_joins(head: str, url: str, tmp_path: Path) -> None:
    given = await token(head, url, "--for", "coordinator")
    ran = await run("join", url, given, "--name", "second", "--state-dir", str(tmp_path / "second"))
    assert (ran.exit_code, ran.output.splitlines()[0]) == (0, "second has joined the fleet as coordinator.")
    member = pki.identity(tmp_path / "second")
    assert member is not None and (member.name, member.role) == ("second", "coordinator")
    again = await run("init", "--state-dir", str(tmp_path / "second"))
    assert again.exit_code == 1
    assert again.output == (
        "sollol shard: second is a member of a fleet that was founded elsewhere, where its tokens are "
        f"issued; to found another here, remove {tmp_path}/second/fleet\n"
    )


async def test_who_joins_another_fleet_is_told_that_he_left_one(head: str, url: str, tmp_path: Path) -> None:
    join.init_fleet(tmp_path / "other", "other")
    runner, other = await site(web.post(join.PATH, join.handler(tmp_path / "other")))
    where = tmp_path / "node"
    for _ in range(2):  # to join again is to join
        ran = await run("join", url, await token(head, url), "--state-dir", str(where))
        assert (ran.exit_code, "left" in ran.output) == (0, False)
    ran = await run("join", other, join.issue_token(tmp_path / "other"), "--state-dir", str(where))
    await runner.cleanup()
    assert "It was a member of another fleet, which it has left." in ran.output
    assert pki.authority(where) == pki.authority(tmp_path / "other")


async def test_a_place_that_cannot_be_written_costs_no_token(head: str, url: str, tmp_path: Path) -> None:
    given = await token(head, url)
    blocked = tmp_path / "blocked"
    join.state.node_id(blocked)
    (blocked / "fleet").write_text("in the way")
    ran = await run("join", url, given, "--state-dir", str(blocked))
    assert ran.exit_code == 1
    assert re.fullmatch(r"sollol shard: .*blocked/fleet.*\n", ran.output), ran.output
    assert (await run("join", url, given, "--state-dir", str(tmp_path / "free"))).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["init", "--state-dir", "/dev/null/x"], "cannot found a fleet: /dev/null/x: Not a directory"),
        (
            ["init", "--url", "ftp://x"],
            "a coordinator's address looks like http://10.0.0.2:11436, not 'ftp://x'",
        ),
        (["join", "http://127.0.0.1:9", "sollol-1"], "a token looks like sollol-1a2b3c4d- and 32 letters"),
        (["join", "http://127.0.0.1:9", "sollol-00000000-" + "a" * 32], "127.0.0.1:9 cannot be reached: "),
    ],
)
async def test_what_goes_wrong_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    more = [] if "--state-dir" in arguments else ["--state-dir", str(tmp_path / "state")]
    ran = await run(*arguments, *more)
    assert ran.exit_code == 1
    assert isinstance(ran.exception, SystemExit)
    assert ran.output.startswith(f"sollol shard: {sentence}") and ran.output.count("\n") == 1
