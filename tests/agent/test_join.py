"""Joining a fleet over plain HTTP: the token is used once, and nobody in between gains by anything."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from typer.testing import CliRunner

from agent import join, pki
from agent.cli import app
from agent.join import CannotJoin, Refused, Token, Tokens


@pytest.fixture
def founder(tmp_path: Path) -> Path:
    join.init_fleet(tmp_path / "founder", "head")
    return tmp_path / "founder"


class Door:
    """The founder's HTTP server; what passes it can be seen and changed."""

    def __init__(self, founder: Path) -> None:
        self.url = ""
        self.asked: list[bytes] = []
        self.answered: list[bytes] = []
        self.request_becomes = lambda body: body
        self.answer_becomes = lambda body: body
        self._handle = join.handler(founder)

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(await request.read())
        forwarded = self.request_becomes(self.asked[-1])
        request._read_bytes = None
        request._payload = aiohttp.streams.StreamReader(request.protocol, 2**16)
        request._payload.feed_data(forwarded)
        request._payload.feed_eof()
        answer = await self._handle(request)
        assert isinstance(answer.body, bytes)
        self.answered.append(answer.body)
        return web.Response(
            status=answer.status, body=self.answer_becomes(answer.body), content_type=answer.content_type
        )


@pytest.fixture
async def door(founder: Path) -> AsyncIterator[Door]:
    door = Door(founder)
    app = web.Application()
    app.router.add_post(join.PATH, door.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    door.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield door
    await runner.cleanup()


def changed(body: bytes, **fields: str) -> bytes:
    return json.dumps(json.loads(body) | fields).encode()


async def test_a_token_makes_a_member_and_neither_key_nor_secret_travels(
    founder: Path, door: Door, tmp_path: Path
) -> None:
    token = join.issue_token(founder)
    assert re.fullmatch(r"sollol-[0-9a-f]{8}-[a-z2-7]{32}", token)
    joined = await join.join(door.url, token, tmp_path / "agent", "gpu-box")
    assert (joined.name, joined.role) == ("gpu-box", "agent")
    assert pki.identity(tmp_path / "agent") == joined
    assert pki.authority(tmp_path / "agent") == pki.authority(founder)
    assert pki.client_context(tmp_path / "agent")
    wire = door.asked[0] + door.answered[0]
    secret = Token.parse(token).secret
    for hidden in (token.rpartition("-")[2].encode(), secret.hex().encode(), b"PRIVATE KEY"):
        assert hidden not in wire.lower() and hidden.upper() not in wire


async def test_the_token_carries_the_role(founder: Path, door: Door, tmp_path: Path) -> None:
    token = join.issue_token(founder, "coordinator")
    assert (await join.join(door.url, token, tmp_path / "second")).role == "coordinator"


async def test_a_token_serves_once(founder: Path, door: Door, tmp_path: Path) -> None:
    token = join.issue_token(founder)
    await join.join(door.url, token, tmp_path / "one")
    with pytest.raises(
        CannotJoin, match=r"^127\.0\.0\.1:\d+ refuses: the token was used already; have a new"
    ):
        await join.join(door.url, token, tmp_path / "two")
    assert pki.identity(tmp_path / "two") is None
    async with (
        aiohttp.ClientSession() as session,
        session.post(door.url + join.PATH, data=door.asked[0]) as replay,
    ):
        assert replay.status == 403
        assert (await replay.json())["error"].startswith("the token was used already")
    assert [path.stat().st_size for path in (pki.fleet_dir(founder) / "tokens").iterdir()] == [0]


async def test_two_that_come_at_once_do_not_both_get_in(founder: Path) -> None:
    token = Token.parse(join.issue_token(founder))
    role, secret = Tokens(founder).check(request_for(token))
    assert (role, secret) == ("agent", token.secret)
    Tokens(founder).check(request_for(token))
    Tokens(founder).use(token.id)
    with pytest.raises(Refused, match="used already"):
        Tokens(founder).use(token.id)


def request_for(token: Token, csr: bytes | None = None) -> join.Request:
    csr = csr or pki.new_request("node", "0011223344556677")[1]
    return join.parse_request(join.make_request(token, "00" * 16, csr))


async def test_a_wrong_secret_does_not_cost_the_token(founder: Path, door: Door, tmp_path: Path) -> None:
    token = join.issue_token(founder)
    wrong = token[:-1] + ("b" if token.endswith("a") else "a")
    with pytest.raises(CannotJoin, match="refuses: the request was not made with the token's secret"):
        await join.join(door.url, wrong, tmp_path / "agent")
    assert await join.join(door.url, token, tmp_path / "agent")


async def test_an_unknown_token_is_told_from_a_used_one(founder: Path, door: Door, tmp_path: Path) -> None:
    with pytest.raises(CannotJoin, match="refuses: the token is not known here; have a new one issued"):
        await join.join(door.url, str(Token("0" * 8, b"x" * 20)), tmp_path / "agent")


def test_a_token_expires(founder: Path) -> None:
    now_s = 1e9
    tokens = Tokens(founder, lambda: now_s)
    token = tokens.issue("agent")
    now_s += join.TOKEN_LIVES_S - 1
    assert tokens.check(request_for(token))
    now_s += 1
    with pytest.raises(Refused, match="the token has expired; have a new one issued"):
        tokens.check(request_for(token))


async def test_a_swapped_request_is_refused(founder: Path, door: Door, tmp_path: Path) -> None:
    _, mine = pki.new_request("intruder", "0011223344556677")
    door.request_becomes = lambda body: changed(body, csr=mine.decode())
    with pytest.raises(CannotJoin, match="the request was not made with the token's secret"):
        await join.join(door.url, join.issue_token(founder), tmp_path / "agent")


async def test_an_answer_of_another_fleet_is_refused(founder: Path, door: Door, tmp_path: Path) -> None:
    join.init_fleet(tmp_path / "other", "other")

    def swap(body: bytes) -> bytes:
        csr = json.loads(door.asked[0])["csr"].encode()
        certificate = pki.issue(tmp_path / "other", csr, "agent")
        return changed(body, ca=pki.authority(tmp_path / "other").decode(), certificate=certificate.decode())

    door.answer_becomes = swap
    with pytest.raises(CannotJoin, match="the answer does not come from whoever issued the token"):
        await join.join(door.url, join.issue_token(founder), tmp_path / "agent")
    assert pki.identity(tmp_path / "agent") is None


async def test_an_answer_given_before_does_not_serve_again(founder: Path) -> None:
    token = Token.parse(join.issue_token(founder))
    answer = join.answer(founder, join.make_request(token, "00" * 16, pki.new_request("n", "0" * 16)[1]))
    assert join.check_answer(answer, token, "00" * 16)
    with pytest.raises(CannotJoin, match="does not come from whoever issued the token"):
        join.check_answer(answer, token, "11" * 16)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"[" * 100_000,
        b'{"token": "../../x", "nonce": "", "csr": "", "mac": ""}',
        b'{"token": "00000000", "nonce": 1, "csr": "", "mac": ""}',
        b'{"token": "00000000"' + b" " * 20_000 + b"}",
    ],
)
async def test_what_is_no_request_is_refused(door: Door, body: bytes) -> None:
    async with aiohttp.ClientSession() as session, session.post(door.url + join.PATH, data=body) as answer:
        assert answer.status == 403
        assert await answer.json() == {"error": "this is no request to join a fleet"}


async def test_a_text_that_is_not_ascii_is_a_wrong_mac(founder: Path) -> None:
    token = Token.parse(join.issue_token(founder))
    body = changed(join.make_request(token, "00", b"csr"), mac="ü")
    with pytest.raises(Refused, match="not made with the token's secret"):
        join.answer(founder, body)


async def test_a_spoilt_request_of_the_holder_does_not_cost_the_token(founder: Path) -> None:
    token = Token.parse(join.issue_token(founder))
    with pytest.raises(Refused, match="the certificate request cannot be read"):
        join.answer(founder, join.make_request(token, "00", b"csr"))
    assert Tokens(founder).check(request_for(token))


def test_only_who_founded_a_fleet_issues_tokens(tmp_path: Path) -> None:
    with pytest.raises(pki.PkiError, match=r"no fleet was founded in .*; run `sollol shard init`"):
        join.issue_token(tmp_path)


async def test_the_founder_joins_no_other_fleet(founder: Path, tmp_path: Path) -> None:
    before = pki.authority(founder)
    with pytest.raises(CannotJoin, match="its founder cannot join another"):
        await join.join("http://127.0.0.1:9", str(Token("0" * 8, b"x" * 20)), founder)
    assert pki.authority(founder) == before


@pytest.mark.parametrize(
    ("url", "token", "sentence"),
    [
        ("http://127.0.0.1:9", "sollol-1", "a token looks like sollol-"),
        ("ftp://x", None, "a coordinator's address looks like http://10.0.0.2:11436, not 'ftp://x'"),
        ("http://127.0.0.1:9", None, "127.0.0.1:9 cannot be reached: connection refused"),
        ("{door}/elsewhere", None, r"127.0.0.1:\d+ is no coordinator of a fleet: it answers 404"),
    ],
)
async def test_what_keeps_from_joining_is_one_sentence(
    door: Door, tmp_path: Path, url: str, token: str | None, sentence: str
) -> None:
    with pytest.raises(CannotJoin, match=f"^{sentence}"):
        await join.join(
            url.format(door=door.url), token or str(Token("0" * 8, b"x" * 20)), tmp_path / "agent"
        )


async def test_it_joins_by_host_and_port_alone_and_again(founder: Path, door: Door, tmp_path: Path) -> None:
    where = door.url.removeprefix("http://")
    one = await join.join(where, join.issue_token(founder), tmp_path / "agent", "a")
    two = await join.join(where, join.issue_token(founder), tmp_path / "agent", "b")
    assert (one.node_id, two.name) == (two.node_id, "b")
    assert pki.server_context(tmp_path / "agent")


async def test_the_command_joins_and_says_so(founder: Path, door: Door, tmp_path: Path) -> None:
    directory = str(tmp_path / "agent")
    command = ["join", door.url, join.issue_token(founder), "--name", "gpu-box", "--state-dir", directory]
    ran = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert (ran.exit_code, ran.output.splitlines()[0]) == (0, "gpu-box has joined the fleet as agent.")
    assert pki.identity(tmp_path / "agent")
    again = await asyncio.to_thread(CliRunner().invoke, app, ["--state-dir", directory, *command[:3]])
    assert again.exit_code == 1
    assert re.fullmatch(r"sollol agent: 127\.0\.0\.1:\d+ refuses: the token was used.*\n", again.output)
