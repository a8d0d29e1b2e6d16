"""Web pages at a node's port: refused before anything else, in the words of the protocol they speak."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from shard.models import Models
from shard.node import Node
from shard.runners import Runners
from shard.server import make_app


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    app = make_app(Node(Models([]), Runners()), "127.0.0.1", origins=["https://chat.example"])
    async with TestServer(app, host="127.0.0.1") as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/tags", {}, 200),
        ("GET", "/api/tags", {"Host": "evil.example"}, 403),
        ("GET", "/api/tags", {"Origin": "https://evil.example"}, 403),
        ("GET", "/api/tags", {"Origin": "https://chat.example"}, 200),
        # A form's POST needs no preflight.
        ("POST", "/api/generate", {"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403),
        ("DELETE", "/api/delete", {"Origin": "https://evil.example"}, 403),
        ("POST", "/v1/messages", {"Host": "evil.example:80", "Origin": "http://evil.example:80"}, 403),
        ("OPTIONS", "/v1/chat/completions", {"Origin": "https://evil.example"}, 403),
        ("OPTIONS", "/v1/chat/completions", {"Origin": "https://chat.example"}, 204),
    ],
)
async def test_pages(
    server: TestServer, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, server.make_url(path), headers=headers) as answer,
    ):
        assert answer.status == status
        allowed = answer.headers.get("Access-Control-Allow-Origin")
        assert allowed == (headers.get("Origin") if status != 403 else None)
        if status == 403:
            body = await answer.json()
            error = body["error"] if isinstance(body["error"], str) else body["error"]["message"]
            assert error.startswith(("Host evil.example is not", "pages of https://evil.example may not"))
