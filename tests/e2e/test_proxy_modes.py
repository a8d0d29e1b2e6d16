"""The proxy as a proxy: HTTP_PROXY and SOCKS, several modes at once, and what it does not let through."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import ollama
import orjson
import pytest

from tests.e2e.curl import Curled, curl
from tests.e2e.house import CHAT, LONE, House, open_house
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream, expected_text

#: On addresses of their own, for mitmproxy takes the same port twice for a mistake, be it 0.
MODES = ["regular@127.0.0.2:0", "socks5@127.0.0.3:0"]
FLAGS = {"regular": "--proxy", "socks5": "--socks5-hostname"}
PROMPT = "[[id:hello]] [[n:40]] Say something."
GENERATE = orjson.dumps({"model": CHAT, "prompt": PROMPT}).decode()
#: The program of a user who knows one node's address and sets HTTP_PROXY.
PROGRAM = f"""
import ollama, sys
client = ollama.Client(sys.argv[1])
for part in client.generate(sys.argv[2], {PROMPT!r}, stream=True):
    print(part.response, end="")
"""


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house(modes=MODES) as opened:
        yield opened


def text_of(got: Curled) -> str:
    assert (got.code, got.status) == (0, 200), got
    return "".join(orjson.loads(line)["response"] for line in got.body.splitlines())


async def program(house: House, url: str, model: str, *, via: str) -> tuple[str, str]:
    """Run the user's program with ``via`` as HTTP_PROXY; its output and complaints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, url, model),
        env={**os.environ, "HTTP_PROXY": via},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return out.decode(), err.decode()


async def test_a_program_with_http_proxy_set(house: House) -> None:
    via, first = f"http://{house.at('regular')}", house.nodes[0]
    out, err = await program(house, first.url, CHAT, via=via)
    assert (check_stream(out, PROMPT), err) == (40, "")
    out, err = await program(house, first.url, LONE, via=via)  # that node does not have it: another one does
    assert (check_stream(out, PROMPT), err) == (40, "")
    [(node, _)] = [(n, got) for n, got in house.reached("/api/generate") if got.model == LONE]
    assert node is house.nodes[2]


async def test_a_node_that_is_dead_is_asked_for_and_another_answers(house: House) -> None:
    first = house.nodes[0]
    await first.kill()
    out, err = await program(house, first.url, CHAT, via=f"http://{house.at('regular')}")
    assert (check_stream(out, PROMPT), err) == (40, "")


@pytest.mark.parametrize("mode", FLAGS)
async def test_curl_through_each_mode(house: House, mode: str) -> None:
    first, how = house.nodes[0], (FLAGS[mode], house.at(mode))
    for node in house.nodes:
        node.fail(Fault("rst", "before_head", path="/api/generate"))
    got = await curl(*how, f"{first.url}/api/generate", "-d", GENERATE)
    check_stream(text_of(got), PROMPT)
    assert int(got.headers["x-sollol-attempts"]) > 1
    tags = await curl(*how, f"{first.url}/api/tags")
    assert {row["name"] for row in tags.json["models"]} >= {f"{LONE}:latest"}  # the fleet's, not that node's
    got = await curl(*how, f"http://localhost:{first.server.port}/api/generate", "-d", GENERATE)
    check_stream(text_of(got), PROMPT)


@pytest.mark.parametrize("mode", FLAGS)
async def test_foreign_targets_get_a_clear_403(house: House, mode: str, unused_tcp_port: int) -> None:
    how = (FLAGS[mode], house.at(mode))
    for target in ("example.test", f"127.0.0.1:{unused_tcp_port}", "[2001:db8::1]:11434"):
        got = await curl(*how, f"http://{target}/api/tags")
        assert (got.code, got.status) == (0, 403), target
        assert "only plain HTTP to the nodes of the fleet" in got.error
        assert house.nodes[0].host_port in got.error


async def test_tunnels_are_refused(house: House) -> None:
    via = f"http://{house.at('regular')}"
    for target in (house.nodes[0].url, "https://example.test"):
        got = await curl("--proxy", via, "--proxytunnel", f"{target}/api/tags")
        assert (got.code, got.statuses) == (56, [403])
        assert "403" in got.said


async def test_tls_is_closed_at_once(house: House) -> None:
    """Where no certificates are, none are made up, and nobody waits for them."""
    for how in (
        (house.url.replace("http", "https"),),
        ("https://example.test", "--socks5-hostname", house.at("socks5")),
        ("http://example.test", "--proxy", f"https://{house.at('regular')}"),
    ):
        got = await curl(*how, "--insecure", "--proxy-insecure", "--max-time", "20")
        assert (got.code, got.statuses) == (35, [])


async def test_all_modes_at_once(house: House) -> None:
    first = house.nodes[0].url
    regular, socks = house.at("regular"), house.at("socks5")
    ways = [
        (house.url,),
        (first, "--proxy", regular),
        (first, "--socks5-hostname", socks),
    ]

    async def one(number: int) -> None:
        url, *how = ways[number % 3]
        prompt = f"[[id:client{number}]] [[n:60]] hello"
        body = orjson.dumps({"model": CHAT, "prompt": prompt}).decode()
        check_stream(text_of(await curl(*how, f"{url}/api/generate", "-d", body)), prompt)

    await asyncio.gather(*map(one, range(18)))
    assert len(house.reached("/api/generate")) == 18


async def test_only_the_clients_networks_are_served() -> None:
    async with open_house(modes=MODES, guard={"clients": ["127.0.0.2/32"]}) as house:
        first = house.nodes[0].url
        ways = [
            (house.url,),
            (first, "--proxy", house.at("regular")),
            (first, "--socks5-hostname", house.at("socks5")),
        ]
        for url, *how in ways:
            got = await curl(*how, f"{url}/api/generate", "-d", GENERATE)
            assert (got.code, got.status) == (0, 403)
            assert got.error.startswith("clients at 127.0.0.1 are not served here")
            assert house.reached("/api/generate") == []
        for url, *how in ways:
            got = await curl("--interface", "127.0.0.2", *how, f"{url}/api/generate", "-d", GENERATE)
            check_stream(text_of(got), PROMPT)
        with pytest.raises(ollama.ResponseError, match="not served here") as told:
            await ollama.AsyncClient(house.url).generate(CHAT, PROMPT)
        assert told.value.status_code == 403
        assert expected_text(PROMPT) not in str(told.value)
