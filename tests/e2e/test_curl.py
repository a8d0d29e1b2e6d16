"""curl through the real proxy: what a shell script does, and what only curl lets one see."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import orjson
import pytest
import zstandard

from tests.e2e.curl import curl, curling
from tests.e2e.house import CHAT, LONE, REMOTE, House, open_house
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream

PROMPT = "[[id:hello]] [[n:40]] Say something."
GENERATE = orjson.dumps({"model": CHAT, "prompt": PROMPT}).decode()
LARGE_BYTES = 64 << 20


async def test_a_stream(house: House) -> None:
    got = await curl(f"{house.url}/api/generate", "-d", GENERATE)
    assert (got.code, got.statuses) == (0, [200])
    assert got.headers["content-type"] == "application/x-ndjson"
    lines = got.body.splitlines(keepends=True)
    assert all(line.endswith(b"\n") and line.strip() for line in lines)
    parts = [orjson.loads(line) for line in lines]
    check_stream("".join(part["response"] for part in parts), PROMPT)
    assert [part["done"] for part in parts] == [False] * 40 + [True]
    assert house.only("/api/generate").body == GENERATE.encode()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_pieces_come_as_the_node_sends_them(house: House, path: str) -> None:
    for node in house.nodes:
        node.fail(Fault("hang", "after_chunks", chunks=6, path=path))
    body = {
        "model": CHAT,
        "max_tokens": 99,
        "stream": True,
        "messages": [{"role": "user", "content": PROMPT}],
    }
    async with curling(house.url + path, "-d", orjson.dumps(body).decode()) as output:
        separator = b"\n" if path.startswith("/api/") else b"\n\n"
        for _ in range(6):
            assert (await output.readuntil(separator)).strip()
        node, seen = await house.wait_one(path)
        assert seen.finished_s is None  # it hangs, and every piece is here
    assert (await node.wait_finished(seen)).finished_s  # curl has left, so does the proxy


async def test_a_stream_that_breaks_ends_with_its_error(house: House) -> None:
    for node in house.nodes:
        node.fail(Fault("rst", "mid_line", chunks=5, path="/api/generate"))
    got = await curl(f"{house.url}/api/generate", "-d", GENERATE)
    assert (got.code, got.status) == (0, 200)
    *parts, last = [orjson.loads(line) for line in got.body.splitlines()]
    assert check_stream("".join(part["response"] for part in parts), PROMPT, complete=False) == 5
    assert set(last) == {"error"} and "failed in mid-answer" in last["error"]


async def test_http_1_0_gets_a_stream_too(house: House) -> None:
    got = await curl("--http1.0", f"{house.url}/api/generate", "-d", GENERATE)
    assert (got.code, got.status, "transfer-encoding" in got.headers) == (0, 200, False)
    parts = [orjson.loads(line) for line in got.body.splitlines()]
    check_stream("".join(part["response"] for part in parts), PROMPT)


async def test_heads_and_one_connection_for_all(house: House) -> None:
    url = house.url
    got = await curl(
        "-I", f"{url}/", f"{url}/api/version", f"{url}/api/tags", "-w", "%{stderr}%{num_connects}"
    )
    assert (got.code, got.statuses, got.said) == (0, [200, 200, 200], "100")
    got = await curl("-I", f"{url}/api/blobs/sha256:{'0' * 64}")
    assert (got.code, got.status) == (0, 404)
    assert (await curl(url)).body == b"Ollama is running"


async def test_a_form_with_a_file(house: House, tmp_path: Path) -> None:
    spoken = b"[[id:spoken]] [[n:30]]" + os.urandom(1 << 20)
    (tmp_path / "a.wav").write_bytes(spoken)
    url, file = f"{house.url}/v1/audio/transcriptions", f"file=@{tmp_path}/a.wav"
    got = await curl(url, "-F", f"model={LONE}", "-F", file, "-F", "response_format=json")
    assert (got.code, got.status) == (0, 200)
    check_stream(got.json["text"], "[[id:spoken]] [[n:30]]")
    [(node, seen)] = house.reached("/v1/audio/transcriptions")
    assert node is house.nodes[2] and seen.body.count(spoken) == 1  # the only one that has the model
    got = await curl(url, "-F", "model=x", "-F", file)
    assert (got.status, got.error) == (404, str({**got.json["error"], "message": "model 'x' not found"}))
    got = await curl(url, "-F", file)
    assert (got.status, got.json["error"]["type"]) == (400, "invalid_request_error")


async def test_a_compressed_body_is_understood_and_goes_on_as_it_is(house: House, tmp_path: Path) -> None:
    message = {"role": "user", "content": f"{PROMPT} {'x' * 300_000}"}
    packed = zstandard.compress(orjson.dumps({"model": LONE, "messages": [message]}))
    (tmp_path / "body.zst").write_bytes(packed)
    how = ("-H", "Content-Encoding: zstd", "-H", "Content-Type: application/json")
    got = await curl(f"{house.url}/v1/chat/completions", *how, "--data-binary", f"@{tmp_path}/body.zst")
    assert (got.code, got.status) == (0, 200)
    check_stream(got.json["choices"][0]["message"]["content"], PROMPT)
    seen = house.only("/v1/chat/completions")
    assert (seen.body, seen.header("content-encoding")) == (packed, "zstd")
    (tmp_path / "body.zst").write_bytes(packed[:50])
    got = await curl(f"{house.url}/v1/chat/completions", *how, "--data-binary", f"@{tmp_path}/body.zst")
    assert (got.code, got.status, got.json["error"]["type"]) == (0, 400, "invalid_request_error")


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_a_large_blob_and_a_model_of_it(house: House, tmp_path: Path, framing: str) -> None:
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(os.urandom(LARGE_BYTES))
    with weights.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    url = f"{house.url}/api/blobs/{digest}"
    how = ["-X", "POST", "-T", weights, "-H", "Expect: 100-continue", "--expect100-timeout", "60"]
    if framing == "chunked":
        how += ["-H", "Transfer-Encoding: chunked"]
    got = await curl(*how, url)
    assert (got.code, got.statuses) == (0, [100, 201]), got.said
    assert [node.store.blobs.get(digest) for node in house.nodes].count(LARGE_BYTES) == 1
    assert (await curl("-I", url)).status == 200
    got = await curl(*how, url, "-w", "%{stderr}%{size_upload}")
    assert (got.code, got.statuses, got.said) == (0, [200], "0")  # it is there: nothing is uploaded again
    assert len(house.reached(f"/api/blobs/{digest}")) == 1
    got = await curl(f"{house.url}/api/create", "-d", f'{{"model":"mine","files":{{"w.gguf":"{digest}"}}}}')
    assert orjson.loads(got.body.splitlines()[-1]) == {"status": "success"}
    got = await curl(f"{house.url}/api/generate", "-d", GENERATE.replace(CHAT, "mine"))
    check_stream("".join(orjson.loads(line)["response"] for line in got.body.splitlines()), PROMPT)


async def test_a_blob_that_is_not_what_it_says(house: House, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    digest = f"sha256:{hashlib.sha256(b'this').hexdigest()}"
    got = await curl("-X", "POST", "-T", tmp_path / "other", f"{house.url}/api/blobs/{digest}")
    assert (got.status, "digest mismatch" in got.error) == (400, True)
    got = await curl("-X", "POST", "-T", tmp_path / "other", f"{house.url}/api/blobs/nonsense")
    assert (got.status, got.error) == (400, "invalid digest format")


async def test_a_large_body_waits_for_continue(house: House, tmp_path: Path) -> None:
    body = orjson.dumps({"model": CHAT, "prompt": PROMPT, "images": ["QUJD" * 1_000_000], "stream": False})
    (tmp_path / "body").write_bytes(body)
    how = ("-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{tmp_path}/body")
    got = await curl(f"{house.url}/api/generate", *how)
    assert (got.code, got.statuses) == (0, [100, 200])
    check_stream(got.json["response"], PROMPT)
    assert house.only("/api/generate").body == body


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"x" * 3_000_000)
    how = ("-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{tmp_path}/body")
    async with open_house(guard={"body_limit_bytes": 1_000_000}) as house:
        got = await curl(f"{house.url}/api/generate", *how, "-w", "%{stderr}%{size_upload}")
        assert (got.code, got.statuses, got.said) == (0, [413], "0")
        assert "larger than 1000000 bytes" in got.error
        got = await curl(f"{house.url}/api/generate", *how, "-H", "Transfer-Encoding: chunked")
        assert (got.code, got.status) == (0, 413)
        assert house.reached("/api/generate") == []


async def test_pull_and_delete(house: House) -> None:
    got = await curl(f"{house.url}/api/pull", "-d", f'{{"model":"{REMOTE.name}"}}')
    rows = [orjson.loads(line) for line in got.body.splitlines()]
    assert rows[-1] == {"status": "success"}
    assert [row["completed"] for row in rows if row.get("completed")][-1] == REMOTE.size
    body = ("-X", "DELETE", "-d", f'{{"model":"{REMOTE.name}"}}')
    got = await curl(f"{house.url}/api/delete", *body)
    assert (got.code, got.status, got.body) == (0, 200, b"")
    got = await curl(f"{house.url}/api/delete", *body)
    assert (got.status, got.error) == (404, f"model '{REMOTE.name}' not found")


async def test_what_is_asked_wrongly_is_told(house: House) -> None:
    url = house.url
    got = await curl(f"{url}/api/nonsense")
    assert (got.status, got.body, got.headers["content-type"]) == (404, b"404 page not found", "text/plain")
    got = await curl(f"{url}/api/chat")
    assert (got.status, got.headers["allow"], got.body) == (405, "POST", b"405 method not allowed")
    got = await curl("-X", "PUT", f"{url}/v1/models")
    assert got.status == 405
    got = await curl(f"{url}/api/chat", "-d", '{"model": "llama3.2", "messages": [')
    assert got.status == 400 and got.error
    got = await curl(f"{url}/api/chat", "-d", "{}")
    assert (got.status, got.error) == (400, "model is required")
    got = await curl("-X", "POST", f"{url}/api/chat")
    assert (got.status, got.error) == (400, "missing request body")
    got = await curl(f"{url}/v1/messages", "-d", "[1, 2]")
    assert (got.status, got.json["type"], got.error) == (400, "error", str(got.json["error"]))
    got = await curl("-H", "Host: evil.test", f"{url}/api/tags")
    assert (got.status, "evil.test" in got.error) == (403, True)
    assert all(not node.requests(path) for node in house.nodes for path in ("/api/chat", "/v1/messages"))
