"""Two proxies, each a process of its own, over one fleet: behind nginx as deployed, and one is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.processes import free_ports
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.ollama_node import FakeModel, FakeOllama
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, Heard, ask
from tests.proxy.processes import Proxy, kill, proxy

CHAT = BY_NAME["chat"]
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
DEPLOYED = Path(__file__).resolve().parents[2] / "deploy" / "nginx" / "sollol.conf"
MODEL = FakeModel("llama3.2", size=1 << 30)


class Site:
    """A fleet of nodes with agents, proxies over it, and clients."""

    def __init__(self, nodes: list[FakeOllama], proxies: list[Proxy], session: aiohttp.ClientSession) -> None:
        self.nodes, self.proxies, self.session = nodes, proxies, session

    def ask(self, number: int, prompt: str) -> asyncio.Task[Heard]:
        return asyncio.create_task(ask(self.session, self.proxies[number].url, CHAT, prompt))

    async def status(self, number: int) -> dict[str, Any]:
        async with self.session.get(self.proxies[number].url + "/sollol/status") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def elsewhere(self, number: int, count: int) -> list[int]:
        """By node, what proxy ``number`` knows of others, once that is ``count`` in all; they tell nobody."""
        async with asyncio.timeout(30):
            while True:
                rows = (await self.status(number))["nodes"]
                found = [row["in_flight_elsewhere"] for row in rows]
                if sum(found) == count:
                    return found
                await asyncio.sleep(0.02)


@asynccontextmanager
async def site(folder: Path, *, alike: bool = False, parallel: int = 1, **more: str) -> AsyncIterator[Site]:
    """Two nodes; unless they are ``alike`` the first is twice as fast, so that everybody wants it."""
    async with AsyncExitStack() as stack:
        fakes, lines = [], []
        for part in (1, 1 if alike else 2):
            speed = {"memory_bandwidth_bytes_s": 1e12 / part, "decode_tok_s": 50.0 / part}
            fake = await stack.enter_async_context(
                FakeOllama([MODEL], num_parallel=parallel, time_scale=0.2, **speed)  # type: ignore[arg-type]
            )
            agent = await stack.enter_async_context(FakeAgent(fake))
            host, _, port = fake.host_port.rpartition(":")
            lines.append(f"  - {{host: {host}, port: {port}, agent: '{agent.url}', parallel: {parallel}}}")
            fakes.append(fake)
        config = folder / "sollol.yaml"
        config.write_text("\n".join(["nodes:", *lines, *(f"{k}: {v}" for k, v in more.items()), ""]))
        proxies = await asyncio.gather(
            *(
                stack.enter_async_context(proxy(folder / str(number), "--config", str(config)))
                for number in (1, 2)
            )
        )
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for fake in fakes:  # in memory everywhere: what decides is who is busy
            await ask(session, fake.url, CHAT, "load")
        found = Site(fakes, list(proxies), session)
        async with asyncio.timeout(30):
            for number in (0, 1):
                while not all(row["resident"] for row in (await found.status(number))["nodes"]):
                    await asyncio.sleep(0.02)
        yield found


@asynccontextmanager
async def nginx(folder: Path, proxies: list[Proxy]) -> AsyncIterator[str]:
    """The deployed configuration before ``proxies``; yields its URL."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    (port,) = free_ports(1)
    text = DEPLOYED.read_text().replace("listen 11434;", f"listen 127.0.0.1:{port};")
    for number, each in enumerate(proxies, 1):
        text = text.replace(f"127.0.0.1:1150{number}", each.url.removeprefix("http://"))
    (folder / "sollol.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temp = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temp} include {folder}/sollol.conf; }}\n"
    )
    process = await asyncio.create_subprocess_exec(
        NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), stderr=asyncio.subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(url + "/api/version") as answer:
                        assert answer.status == 200
                        break
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.02)
        yield url
    finally:
        process.terminate()
        await process.wait()


def prompt(name: str, tokens: int = 8) -> str:
    return f"[[id:{name}]] [[n:{tokens}]]"


async def test_what_goes_through_one_proxy_makes_the_other_choose_elsewhere(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        fast, slow = (node.host_port for node in here.nodes)
        assert (await here.ask(1, prompt("idle"))).headers["x-sollol-node"] == fast
        here.nodes[0].hold_tokens()
        first = here.ask(0, prompt("first"))
        assert await here.elsewhere(1, 1) == [1, 0]
        assert (await here.ask(1, prompt("second"))).headers["x-sollol-node"] == slow
        here.nodes[0].go_on()
        assert (await first).headers["x-sollol-node"] == fast
        await here.elsewhere(1, 0)
        assert (await here.ask(1, prompt("third"))).headers["x-sollol-node"] == fast


async def test_who_finds_all_slots_taken_by_the_other_proxy_waits_for_the_first_that_is_free(
    tmp_path: Path,
) -> None:
    async with site(tmp_path, alike=True) as here:
        for node in here.nodes:
            node.hold_tokens()
        taken = [here.ask(0, prompt("a")), here.ask(0, prompt("b"))]
        assert await here.elsewhere(1, 2) == [1, 1]
        waits = here.ask(1, prompt("waits"))
        async with asyncio.timeout(30):
            while not (await here.status(1))["queue_depth"]:
                await asyncio.sleep(0.02)
        here.nodes[1].go_on()
        heard = await waits
        assert heard.headers["x-sollol-node"] == here.nodes[1].host_port
        check_stream(heard.text, prompt("waits"))
        here.nodes[0].go_on()
        await asyncio.gather(*taken)


async def test_a_long_line_at_one_proxy_does_not_keep_the_other_one_s_clients_waiting(tmp_path: Path) -> None:
    async with site(tmp_path, alike=True) as here:
        for node in here.nodes:
            node.hold_tokens()
        batch = [here.ask(0, prompt(f"batch{number}", 4)) for number in range(24)]
        async with asyncio.timeout(30):
            while (await here.status(0))["queue_depth"] < 22:
                await asyncio.sleep(0.02)
            user = here.ask(1, prompt("user", 4))
            while not (await here.status(1))["queue_depth"]:
                await asyncio.sleep(0.02)
        for node in here.nodes:
            node.go_on()
        check_stream((await user).text, prompt("user", 4))
        assert not all(task.done() for task in batch)
        assert (await here.status(0))["queue_depth"] > 5  # those who came long before it
        for heard in await asyncio.gather(*batch):
            assert heard.status == 200


async def test_a_proxy_that_is_killed_loses_only_the_streams_that_it_carried(tmp_path: Path) -> None:
    async with site(tmp_path, parallel=16) as here, nginx(tmp_path, here.proxies) as url:
        prompts = [prompt(f"s{number}", 500) for number in range(12)]
        begun = [asyncio.Event() for _ in prompts]

        async def stream(number: int) -> Heard:
            heard = Heard(0, {})
            async with here.session.post(url + CHAT.path, json=CHAT.body(prompts[number])) as answer:
                heard.status = answer.status
                try:
                    async for chunk in answer.content.iter_any():
                        heard.raw += chunk
                        begun[number].set()
                except aiohttp.ClientPayloadError:
                    heard.broken = True
            CHAT.read(heard)
            return heard

        for node in here.nodes:
            node.hold_tokens()
        streams = [asyncio.create_task(stream(number)) for number in range(len(prompts))]
        async with asyncio.timeout(30):
            while sum([(await here.status(number))["in_flight"] for number in (0, 1)]) < len(prompts):
                await asyncio.sleep(0.02)
            for node in here.nodes:
                node.go_on()
            await asyncio.gather(*(event.wait() for event in begun))
        for node in here.nodes:
            node.hold_tokens()
        carried = [(await here.status(number))["in_flight"] for number in (0, 1)]
        assert sum(carried) == len(prompts) and all(carried)
        assert sum(await here.elsewhere(1, carried[0])) == carried[0]
        await kill(here.proxies[0])
        await here.elsewhere(1, 0)  # forgotten by all that share the nodes
        assert (await here.status(1))["in_flight"] == carried[1]
        for node in here.nodes:
            node.go_on()
        found = await asyncio.gather(*streams)
        for asked, heard in zip(prompts, found, strict=True):
            check_stream(heard.text, asked, complete=not heard.broken)
        assert [heard.broken for heard in found].count(True) == carried[0]
        for number in range(6):  # nginx leaves the dead one out, and no client notices
            heard = await ask(here.session, url, CHAT, prompt(f"after{number}"))
            assert heard.status == 200
            check_stream(heard.text, prompt(f"after{number}"))


async def test_behind_nginx_each_client_is_known_by_its_own_address(tmp_path: Path) -> None:
    trusting = {"guard": "{trusted_proxies: [127.0.0.1], clients: [127.0.0.0/8, 10.0.0.0/8]}"}
    async with site(tmp_path, **trusting) as here, nginx(tmp_path, here.proxies) as url:
        connector = aiohttp.TCPConnector(local_addr=("127.0.0.7", 0))
        async with aiohttp.ClientSession(connector=connector) as session:
            heard = await ask(session, url, CHAT, prompt("x"))
        assert heard.status == 200
        found = []
        for each in here.proxies:
            async with here.session.get(each.url + "/sollol/decisions") as answer:
                found += [entry["client"] for entry in (await answer.json())["requests"]]
        assert found == ["127.0.0.7"]
