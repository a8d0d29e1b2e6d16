"""What a client that streams is told while its model loads, and how the answer goes on from there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from agent.report import ShardLoad
from shard.answer import Answer
from shard.llama_server import LlamaServerError
from shard.node import errors
from shard.replies import chat_object

LOAD = ShardLoad(model="m", phase="loading", progress=0.5, eta_s=3.0, since_s=5.0)


async def asked(ask: dict[str, Any], *, fails: bool) -> tuple[int, str, list[dict[str, Any]]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        answer = Answer(request, chat_object)
        answer.ask = ask
        await answer.tell(LOAD)
        await answer.tell(LOAD)
        if fails:
            raise LlamaServerError("llama-server process has terminated: exit status 1")
        return await answer.lifecycle("load")

    app = web.Application(middlewares=[errors])
    app.router.add_post("/api/chat", handler)
    async with TestClient(TestServer(app)) as client, client.post("/api/chat") as response:
        lines = (await response.text()).splitlines()
        return response.status, response.content_type, [json.loads(line) for line in lines]


async def test_a_stream_begins_with_how_far_the_load_is() -> None:
    status, kind, lines = await asked({"model": "m"}, fails=False)
    assert (status, kind) == (200, "application/x-ndjson")
    told, again, last = lines
    assert told["_sollol"]["load"]["progress"] == again["_sollol"]["load"]["progress"] == 0.5
    assert (told["message"]["content"], told["done"]) == ("", False)
    assert (last["done"], last["done_reason"]) == (True, "load")


async def test_a_load_that_fails_after_that_ends_with_an_error_line() -> None:
    status, _, lines = await asked({"model": "m"}, fails=True)
    assert status == 200
    assert lines[-1] == {"error": "llama-server process has terminated: exit status 1"}


@pytest.mark.parametrize(("fails", "expected"), [(False, 200), (True, 500)])
async def test_a_client_that_does_not_stream_waits_in_silence(fails: bool, expected: int) -> None:
    status, kind, lines = await asked({"model": "m", "stream": False}, fails=fails)
    assert (status, kind, len(lines)) == (expected, "application/json", 1)
