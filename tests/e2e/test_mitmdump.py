"""The same chain in somebody's own mitmdump: ``mitmdump -s proxy_addon/addon.py``."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import aiohttp

from tests.fakes.fixtures import NodeFactory
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask

ADDON = Path(__file__).parents[2] / "proxy_addon/addon.py"
PROMPT = "[[id:dump]] [[n:9]]"
MITMDUMP = "from mitmproxy.tools.main import mitmdump; mitmdump()"


async def test_it_routes_fails_over_and_ends(
    ollama_node: NodeFactory, tmp_path: Path, unused_tcp_port: int
) -> None:
    nodes = [await ollama_node() for _ in range(2)]
    settings = {
        "nodes": ",".join(node.host_port for node in nodes),
        "discovery.mdns": "false",
        "discovery.ollama_host": "false",
        "placement": "round_robin",
        "state_dir": str(tmp_path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MITMDUMP, "-s", str(ADDON), "--set", f"confdir={tmp_path}",
        "--mode", f"reverse:http://sollol.invalid:11434@127.0.0.1:{unused_tcp_port}",
        *(part for name, value in settings.items() for part in ("--set", f"sollol={name}={value}")),
        cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"},  # its log is waited for
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    try:
        async with asyncio.timeout(60):
            while b"SOLLOL listens on " not in (line := await process.stdout.readline()):
                assert line, "mitmdump ended"
        assert f"127.0.0.1:{unused_tcp_port}: 2 of 2 nodes up".encode() in line
        url = f"http://127.0.0.1:{unused_tcp_port}"
        async with aiohttp.ClientSession() as session:
            for way in (BY_NAME["chat"], BY_NAME["openai"]):
                check_stream((await ask(session, url, way, PROMPT)).text, PROMPT)
            await nodes[0].kill()
            for _ in range(2):
                heard = await ask(session, url, BY_NAME["chat"], PROMPT)
                check_stream(heard.text, PROMPT)
                assert heard.headers["x-sollol-node"] == nodes[1].host_port
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0


async def test_a_mistaken_setting_stops_mitmdump_with_its_sentence(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MITMDUMP, "-s", str(ADDON), "--set", f"confdir={tmp_path}",
        "--mode", "reverse:http://sollol.invalid:11434@127.0.0.1:0", "--set", "sollol=plcement=score",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"plcement is not a setting; did you mean placement?" in out
