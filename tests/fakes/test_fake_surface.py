"""Routes, shapes and refusals as Ollama has them, seen from a raw socket."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from typing import Any

import httpx
import pytest
import zstandard

from tests.fakes.fixtures import NodeFactory
from tests.fakes.raw import ask, request_bytes
from tests.fakes.store import GIB, FakeModel
from tests.fakes.tokens import expected_text

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "[[id:abc]]"}]}
FOREIGN = {"Host": "evil.example"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "body"),
    [
        ("GET", "/", {}, 200, b"Ollama is running"),
        ("GET", "/api/version", {}, 200, b'{"version":"0.33.0"}'),
        ("GET", "/nothing", {}, 404, b"404 page not found"),
        ("POST", "/v1/messages/count_tokens", {}, 404, b"404 page not found"),
        ("GET", "/metrics", {}, 404, b"404 page not found"),
        ("GET", "/api/chat", {}, 405, b"405 method not allowed"),
        ("POST", "/api/ps", {}, 405, b"405 method not allowed"),
        ("GET", "/api/tags/", {}, 301, b""),
        ("GET", "/api/version", FOREIGN, 403, b""),
        ("GET", "/api/version", {"Host": "192.168.1.7:11434"}, 200, b'{"version":"0.33.0"}'),
        ("GET", "/api/version", {"Host": "node.local"}, 200, b'{"version":"0.33.0"}'),
        ("GET", "/api/version", {"Origin": "https://evil.example"}, 403, b""),
        ("GET", "/api/version", {"Origin": "http://localhost:3000"}, 200, b'{"version":"0.33.0"}'),
        (
            "GET",
            "/api/version",
            {"Host": "10.0.0.1", "Origin": "http://10.0.0.1"},
            200,
            b'{"version":"0.33.0"}',
        ),
        ("POST", "/api/chat", {}, 400, b'{"error":"missing request body"}'),
    ],
)
async def test_routes(
    ollama_node: NodeFactory, method: str, path: str, headers: dict[str, str], status: int, body: bytes
) -> None:
    node = await ollama_node()
    answer = await ask(node.host_port, request_bytes(path, method=method, **headers))
    assert (answer.status, answer.body) == (status, body)


async def test_host_and_origin_checks_can_be_switched_off(ollama_node: NodeFactory) -> None:
    node = await ollama_node(host_check=False, origin_check=False)
    sent = request_bytes("/api/version", Host="evil.example", Origin="https://evil.example")
    assert (await ask(node.host_port, sent)).status == 200


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_head_has_the_length_and_no_body(ollama_node: NodeFactory, path: str) -> None:
    node = await ollama_node()
    got = await ask(node.host_port, request_bytes(path))
    head = await ask(node.host_port, request_bytes(path, method="HEAD"))
    assert head.status == 200 and head.body == b""
    assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/generate", {"model": "no", "prompt": "x"}, 404, "model 'no' not found"),
        ("/api/chat", {"model": "no", "messages": []}, 404, "model 'no' not found"),
        ("/api/chat", {}, 400, "model is required"),
        ("/api/show", {"model": "no"}, 404, "model 'no' not found"),
        ("/api/embed", {"model": "no", "input": "x"}, 404, 'model "no" not found, try pulling it first'),
        ("/api/embeddings", {"model": "LLAMA3.2", "prompt": "x"}, 404, None),
        ("/api/embed", {"model": "llama3.2", "input": 7}, 400, "invalid input type"),
        ("/api/copy", {"source": "no", "destination": "x"}, 404, 'model "no" not found'),
        ("/api/push", {"model": "no"}, 404, "model 'no' not found"),
        ("/api/pull", {"model": "bad name"}, 400, "invalid model name"),
        ("/api/chat", b"{not json", 400, None),
        ("/api/chat", b"[1]", 400, None),
    ],
)
async def test_errors(ollama_node: NodeFactory, path: str, body: Any, status: int, error: str | None) -> None:
    node = await ollama_node()
    answer = await ask(node.host_port, request_bytes(path, body))
    assert answer.status == status and set(answer.json) == {"error"}
    assert error is None or answer.json["error"] == error


async def test_a_model_says_what_it_lacks(ollama_node: NodeFactory) -> None:
    node = await ollama_node([FakeModel("plain", capabilities=("completion",))])
    tools = {"model": "plain", "messages": CHAT["messages"], "tools": [{"function": {"name": "f"}}]}
    think = {"model": "plain", "messages": CHAT["messages"], "think": True}
    assert (
        "does not support tools"
        in (await ask(node.host_port, request_bytes("/api/chat", tools))).json["error"]
    )
    answer = await ask(node.host_port, request_bytes("/api/chat", think))
    assert (answer.status, answer.json["error"]) == (400, '"plain" does not support thinking')


async def test_show_and_tags_agree(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    tags = (await ask(node.host_port, request_bytes("/api/tags"))).json["models"]
    show = (await ask(node.host_port, request_bytes("/api/show", {"model": "llama3.2"}))).json
    assert len(tags[0]["digest"]) == 64 and tags[0]["size"] == 2 * GIB
    assert f"/blobs/sha256-{node.store.listing()[0].blob}" in show["modelfile"]
    assert show["model_info"]["llama.block_count"] == 28 and show["capabilities"] == tags[0]["capabilities"]


async def test_no_models_is_null_in_openai(ollama_node: NodeFactory) -> None:
    node = await ollama_node([])
    assert (await ask(node.host_port, request_bytes("/v1/models"))).json == {"object": "list", "data": None}


async def test_pull_streams_progress_and_errors_inside_a_200(ollama_node: NodeFactory) -> None:
    node = await ollama_node([], remote=["mistral"])
    rows = (await ask(node.host_port, request_bytes("/api/pull", {"model": "mistral"}))).lines
    assert rows[0] == {"status": "pulling manifest"} and rows[-1] == {"status": "success"}
    bars = [row for row in rows if "total" in row]
    assert [bar.get("completed", 0) for bar in bars] == [0, GIB // 2, GIB, 3 * GIB // 2, 2 * GIB]
    assert node.store.find("mistral") is not None
    missing = await ask(node.host_port, request_bytes("/api/pull", {"model": "no"}))
    assert missing.status == 200 and "error" in missing.lines[-1]
    whole = {"model": "no", "stream": False}
    assert (await ask(node.host_port, request_bytes("/api/pull", whole))).status == 500


async def test_a_left_pull_is_cancelled_and_resumes(ollama_node: NodeFactory) -> None:
    node = await ollama_node([], remote=["mistral"], pull_bytes_s=GIB)
    sent = request_bytes("/api/pull", {"model": "mistral"})
    asked = asyncio.ensure_future(ask(node.host_port, sent))
    await node.wait_until(lambda: bool(node.received) and node.received[0].chunks >= 3)
    node.pull_bytes_s = 1.0  # what is left would take years
    asked.cancel()
    assert (await node.wait_finished(node.received[0])).outcome == "cancelled"
    node.pull_bytes_s = 10.0 * GIB
    assert node.store.find("mistral") is None
    bars = [row for row in (await ask(node.host_port, sent)).lines if "total" in row]
    assert bars[0]["completed"] >= GIB // 2


async def test_blobs_then_create_then_delete(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    data = b"GGUF" + b"\0" * 300_000
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = f"/api/blobs/{digest}"
    statuses = [
        (await ask(node.host_port, request_bytes(where, body, method))).status
        for method, where, body in [
            ("HEAD", path, None),
            ("POST", "/api/blobs/md5:1", b"x"),
            ("POST", path, b"something else"),
            ("POST", path, data),
            ("HEAD", path, None),
            ("POST", path, data),
        ]
    ]
    assert statuses == [404, 400, 400, 201, 200, 200]
    uploads = node.requests(path, "POST")
    assert uploads[1].body_bytes == len(data) and uploads[1].body == b"", "streamed, not kept"
    assert uploads[2].body_bytes == 0, "an existing blob's body is not read"
    create = {"model": "mine", "files": {"model.gguf": digest}}
    assert (await ask(node.host_port, request_bytes("/api/create", create))).lines[-1] == {
        "status": "success"
    }
    assert (
        await ask(node.host_port, request_bytes("/api/generate", {"model": "mine", "prompt": "x"}))
    ).status == 200
    gone = request_bytes("/api/delete", {"model": "mine"}, "DELETE")
    assert [(await ask(node.host_port, gone)).status for _ in range(2)] == [200, 404]


async def test_create_from_a_missing_model_pulls_it(ollama_node: NodeFactory) -> None:
    node = await ollama_node([], remote=["base"])
    sent = request_bytes("/api/create", {"model": "mine", "from": "base", "system": "be brief"})
    rows = (await ask(node.host_port, sent)).lines
    assert rows[0] == {"status": "pulling manifest"} and rows[-1] == {"status": "success"}
    mine, base = node.store.find("mine"), node.store.find("base")
    assert mine and base and mine.blob == base.blob and mine.digest != base.digest


async def test_a_chunked_upload_and_expect_continue(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    data = b"y" * 100_000
    digest = hashlib.sha256(data).hexdigest()

    async def parts() -> Any:
        for start in range(0, len(data), 9000):
            yield data[start : start + 9000]

    async with httpx.AsyncClient(base_url=node.url, trust_env=False) as client:
        assert (await client.post(f"/api/blobs/sha256-{digest}", content=parts())).status_code == 201
    host, port = node.host_port.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = request_bytes(f"/api/blobs/sha256-{'0' * 64}", b"z", "POST", Expect="100-continue")
    writer.write(sent[:-1])
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"z")
    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_zstd_bodies_only_on_v1(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    packed = zstandard.ZstdCompressor().compress(request_bytes("/", CHAT).partition(b"\r\n\r\n")[2])
    openai = await ask(node.host_port, request_bytes("/v1/chat/completions", packed, Content_Encoding="zstd"))
    assert openai.json["choices"][0]["message"]["content"] == expected_text("[[id:abc]]")
    assert (
        await ask(node.host_port, request_bytes("/api/chat", packed, Content_Encoding="zstd"))
    ).status == 400


async def test_keep_alive_connections_and_pipelining(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    host, port = node.host_port.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request_bytes("/api/version") * 3)
    for _ in range(3):
        assert (await reader.readuntil(b'{"version":"0.33.0"}')).startswith(b"HTTP/1.1 200 OK")
    writer.write(b"nonsense\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request")
    assert node.server.accepted == 1 and len(node.received) == 3
    writer.close()


async def test_the_head_goes_out_with_the_first_token(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.hold_tokens()
    asked = asyncio.ensure_future(ask(node.host_port, request_bytes("/api/chat", CHAT)))
    await node.wait_until(lambda: any(runner.decoding for runner in node.scheduler.runners.values()))
    assert node.received[0].head_sent_s is None
    node.go_on()
    await asked
    assert node.received[0].head_sent_s is not None and node.received[0].model == "llama3.2"


async def test_signed_routes_need_the_node_to_be_signed_in(ollama_node: NodeFactory) -> None:
    node = await ollama_node(signed_in=False)
    answer = await ask(node.host_port, request_bytes("/api/me", method="POST"))
    assert answer.status == 401 and "signin_url" in answer.json


async def test_as_a_process() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.ollama_node",
        "--models",
        "a=1000,b-embed",
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        host_port = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        tags = (await ask(host_port, request_bytes("/api/tags"))).json["models"]
        assert {row["name"]: row["size"] for row in tags} == {"a:latest": 1000, "b-embed:latest": 274 << 20}
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
