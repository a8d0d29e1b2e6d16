"""Odd but legal bytes on the client's side of the real proxy, and what they must not do to anybody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import orjson
import pytest
import zstandard

from proxy_addon.ask import parse
from proxy_addon.endpoints import match
from proxy_addon.settings import Settings
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.raw import request_bytes
from tests.fakes.store import embedding_model
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

CHAT = {"model": "llama3.2", "stream": False, "messages": [{"role": "user", "content": "[[n:2]] hi"}]}


@pytest.fixture
async def node() -> AsyncIterator[FakeOllama]:
    async with FakeOllama() as node:
        yield node


@pytest.fixture
async def proxy(node: FakeOllama) -> AsyncIterator[RunningProxy]:
    async with RunningProxy([node]) as proxy:
        yield proxy


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/nowhere", "localhost", 404),
        ("/api/ps", "localhost", 405),
        ("/api/chat", "localhost", 405),
        ("/api/blobs/sha256:zz", "localhost", 400),
        ("/api/tags", "rebound.example", 403),
        ("/sollol/nowhere", "localhost", 404),
    ],
)
async def test_a_refused_head_leaves_the_connection_in_step(
    proxy: RunningProxy, path: str, host: str, status: int
) -> None:
    """A body after the head would be taken for the beginning of the next answer."""
    after = request_bytes("/api/version", Connection="close")
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"HEAD {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() + after)
    async with asyncio.timeout(10):
        first, _, second = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert first.startswith(f"HTTP/1.1 {status} ".encode())
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_trailing_slash_reaches_the_node_without_it(
    proxy: RunningProxy, node: FakeOllama, session: aiohttp.ClientSession
) -> None:
    """A node would redirect: where its address is not the client's, the client could not follow."""
    async with session.post(f"{proxy.url}/api/chat/?a=1", json=CHAT, allow_redirects=False) as answer:
        assert answer.status == 200
        assert (await answer.json())["done"] is True
    [received] = [each for each in node.received if each.path.startswith("/api/chat")]
    assert (received.path, received.query) == ("/api/chat", "a=1")


async def test_numbers_beyond_every_machine_are_refused_and_cost_no_journal(
    proxy: RunningProxy, session: aiohttp.ClientSession
) -> None:
    body = b'{"model":"llama3.2","options":{"num_ctx":99999999999999999999999},"messages":[]}'
    async with session.post(f"{proxy.url}/api/chat", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"] == "num_ctx must be a whole number of at most 63 bits"
        request_id = answer.headers["x-sollol-request-id"]
    async with session.get(f"{proxy.url}/sollol/explain/{request_id}") as answer:
        assert answer.status == 200


async def test_a_name_that_one_endpoint_does_not_take_hides_the_model_from_nobody(
    node: FakeOllama, session: aiohttp.ClientSession
) -> None:
    """Ollama's /api/embeddings alone minds the case of names: every node answers 404, and holds the model."""
    node.store.add(embedding_model())
    async with RunningProxy([node], poll={"interval_s": 3600}) as proxy:
        shouted = {"model": "NOMIC-EMBED-TEXT", "prompt": "hi"}
        async with session.post(f"{proxy.url}/api/embeddings", json=shouted) as answer:
            assert answer.status == 404
        async with session.post(
            f"{proxy.url}/api/embed", json={"model": "nomic-embed-text", "input": "hi"}
        ) as answer:
            assert answer.status == 200, await answer.text()


@pytest.mark.parametrize(
    ("boundary", "disposition"),
    [
        ("multipart/form-data; boundary=B", 'form-data; name="model"'),
        ('Multipart/Form-Data; Boundary="B"', "form-data; name=model"),
        ("multipart/form-data; charset=utf-8; boundary=B", 'FORM-DATA; NAME="model"'),
    ],
)
async def test_a_recording_called_model_is_not_the_model(
    proxy: RunningProxy, session: aiohttp.ClientSession, boundary: str, disposition: str
) -> None:
    form = (
        '--B\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\nRIFF\r\n'
        f"--B\r\ncontent-disposition: {disposition}\r\n\r\nno-such-model\r\n--B--\r\n"
    ).encode()
    async with session.post(
        f"{proxy.url}/v1/audio/transcriptions", data=form, headers={"content-type": boundary}
    ) as answer:
        assert (await answer.json())["error"]["message"] == "model 'no-such-model' not found"


def test_a_zstd_body_of_several_frames_is_one_body() -> None:
    plain = orjson.dumps(CHAT)
    frames = zstandard.compress(plain[:20]) + zstandard.compress(plain[20:])
    endpoint = match("/v1/chat/completions")
    assert endpoint is not None
    assert parse(endpoint, endpoint.path, {"content-encoding": "zstd"}, frames, "").model == "llama3.2"


async def test_a_state_directory_that_refuses_costs_only_what_would_be_kept(
    node: FakeOllama, session: aiohttp.ClientSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = tmp_path / "a file"
    taken.touch()
    async with RunningProxy([node], state_dir=taken) as proxy:
        async with session.post(f"{proxy.url}/api/chat", json=CHAT) as answer:
            assert answer.status == 200
        polls = proxy.sollol.session()
    assert polls.closed
    assert f"Learned speeds cannot be kept: [Errno 17] File exists: '{taken}'." in caplog.messages
    assert not [entry for entry in caplog.records if entry.exc_info]


async def test_a_client_that_stops_reading_is_hung_up_on_and_its_node_not_blamed() -> None:
    """It holds a slot of its node, which cannot go on; but nothing is wrong with the node."""
    async with (
        FakeOllama(time_scale=0.0) as node,
        RunningProxy([node], timeouts={"idle_s": 0.3}) as proxy,
    ):
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            endless = {"model": "llama3.2", "prompt": "[[n:100000]]"}
            client.sendall(request_bytes("/api/generate", endless))
            async with asyncio.timeout(30):
                while not proxy.sollol.journal.recent(1):
                    await asyncio.sleep(0.02)
        (made,) = proxy.sollol.journal.recent(1)
        assert made["outcome"] == "client_left"
        assert proxy.sollol.fleet.nodes[node.host_port].health.failures == 0
        asked = next(request for request in node.received if request.path == "/api/generate")
        async with asyncio.timeout(10):
            while asked.outcome == "open":
                await asyncio.sleep(0.01)
        assert asked.outcome == "cancelled"


async def test_an_ipv6_address_is_one_to_listen_on(node: FakeOllama, session: aiohttp.ClientSession) -> None:
    assert Settings.model_validate({"modes": ["regular@[::1]:8080"]}).modes == ("regular@::1:8080",)
    async with (
        RunningProxy([node], listen="[::1]:0") as proxy,
        session.get(f"http://[::1]:{proxy.port}/api/version") as answer,
    ):
        assert answer.status == 200
