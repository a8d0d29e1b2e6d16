"""What is kept of llama-server's own log: whole lines, and nothing that a client has sent."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from shard.llama_server import Launch, LlamaServer, LlamaServerError, _lines


async def test_lines_written_in_pieces_are_one_and_the_last_needs_no_end() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"0.1 E ")
    read = asyncio.create_task(_gathered(stream))
    await asyncio.sleep(0)  # it waits with half a line
    stream.feed_data(b"srv: broken\nterminate ca")
    stream.feed_data("lled: größe".encode())
    stream.feed_eof()
    assert await read == ["0.1 E srv: broken", "terminate called: größe"]


async def test_a_line_without_end_does_not_fill_the_memory() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"x" * 2**20 + b"\nnext\n")
    stream.feed_eof()
    lines = await _gathered(stream)
    assert len(lines[0]) < 2**18 and lines[-1] == "next"


async def test_a_refused_request_is_not_quoted_in_the_log(
    gguf_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await LlamaServer.start(Launch(gguf_path, 256, threads=1))
    try:
        body = {
            "messages": [{"role": "user", "content": "plum"}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "plum"}}},
        }
        status, answer = await server.post("/v1/chat/completions", body)
    finally:
        await server.stop()
    assert status == 400 and b"plum" in answer  # its sender is told
    assert "got exception" in caplog.text and "plum" not in caplog.text


async def test_a_child_that_aborts_leaves_its_own_last_words(gguf_path: Path) -> None:
    # A batch of one token is less than llama-server computes as it starts.
    with pytest.raises(LlamaServerError, match=r"signal: aborted: .*GGML_ASSERT\(n_tokens_all"):
        await LlamaServer.start(Launch(gguf_path, 256, threads=1, num_batch=1))


async def _gathered(stream: asyncio.StreamReader) -> list[str]:
    return [line async for line in _lines(stream)]
