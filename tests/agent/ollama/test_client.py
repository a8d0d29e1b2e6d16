"""The client: what it returns, and how each way in which a server can fail is told."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from agent.ollama.client import (
    OllamaClient,
    OllamaError,
    OllamaUnreachable,
    error_message,
    parse_ps,
    parse_tags,
    split_lines,
)
from tests.agent.conftest import FakeOllama, resident

type Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[OllamaClient]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve one handler on every path and return a client of it."""
    closing = []

    async def start(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> OllamaClient:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = OllamaClient(f"http://127.0.0.1:{runner.addresses[0][1]}")
        closing.extend([client.close, runner.cleanup])
        return client

    yield start
    for close in closing:
        await close()


async def test_the_three_lists(ollama: FakeOllama) -> None:
    ollama.resident = [resident("gemma3:270m")]
    async with OllamaClient(ollama.url) as client:
        assert await client.version() == "0.33.0"
        models, loaded = await client.tags(), await client.ps()
    assert [model.name for model in models] == ["gemma3:270m", "llama3.2:latest"]
    assert models[0].model_dump(mode="json")["capabilities"] == ["completion"]  # unknown fields are kept
    assert (loaded[0].size, loaded[0].size_vram, loaded[0].context_length) == (
        1_000_000_000,
        600_000_000,
        4096,
    )
    assert loaded[0].expires_at is not None


def test_an_empty_list_is_written_as_null() -> None:
    assert parse_tags(b'{"models":null}') == []
    assert parse_ps(b'{"models":[]}') == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"models":[{}]}', b'{"models":7}'])
def test_a_body_of_another_server_is_an_error(body: bytes) -> None:
    for parse in (parse_tags, parse_ps):
        with pytest.raises(OllamaError, match="is not an answer of Ollama"):
            parse(body)


async def test_an_error_carries_status_and_text(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "model 'x' not found"}, status=404)

    client = await serve(handler)
    with pytest.raises(OllamaError) as caught:
        await client.show("x")
    assert (caught.value.status, caught.value.message) == (404, "model 'x' not found")


async def test_a_redirect_is_not_followed(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("http://127.0.0.1:9/")

    client = await serve(handler)
    with pytest.raises(OllamaError) as caught:
        await client.version()
    assert caught.value.status == 307


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":"busy"}', "busy"),
        (b'{"error":{"message":"no","type":"x"}}', "no"),
        (b"404 page not found\n", "404 page not found"),
        (b"", "status 500 without a body"),
        (b"[1]", "[1]"),
    ],
)
def test_error_message(body: bytes, message: str) -> None:
    assert error_message(500, body) == message


async def test_refused_and_unresolvable_are_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    async with OllamaClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(OllamaUnreachable, match="cannot be reached: Connection refused"):
            await client.version()


async def test_an_answer_that_breaks_off_is_unreachable(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"models"')
        assert request.transport is not None
        request.transport.abort()
        return response

    client = await serve(handler)
    with pytest.raises(OllamaUnreachable):
        await client.tags()


async def test_silence_is_unreachable_after_the_time_given(ollama: FakeOllama) -> None:
    ollama.stalled.add("/api/ps")
    async with OllamaClient(ollama.url) as client:
        with pytest.raises(OllamaUnreachable, match="did not answer /api/ps in time"):
            await client.request("GET", "/api/ps", timeout_s=0.05)


async def test_a_proxy_of_the_environment_is_not_used(
    ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with OllamaClient(ollama.url) as client:
        assert await client.version() == "0.33.0"


@pytest.mark.parametrize("url", ["127.0.0.1:11434", "ftp://x", "http://", "", "/api", "http://x:port"])
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must look like http://127"):
        OllamaClient(url)


async def test_a_path_in_the_address_is_kept(serve: Serve) -> None:
    paths = []

    async def handler(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        return web.json_response({"version": "1"})

    client = await serve(handler)
    async with OllamaClient(f"{client.url}/ollama/") as below:
        await below.version()
    assert paths == ["/ollama/api/version"]


async def test_stream_yields_every_object_and_skips_blank_lines(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert await request.json() == {"model": "x"}
        return web.Response(body=b'{"status":"a"}\n{"status":"b"}\n\n{"error":"disk full"}')

    client = await serve(handler)
    got = [line async for line in client.stream("POST", "/api/pull", json={"model": "x"})]
    assert got == [{"status": "a"}, {"status": "b"}, {"error": "disk full"}]


async def test_stream_puts_together_what_the_network_cut(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b'{"status":"a"}\n{"status":"b"}\n{"status":"c"}')

    async def byte_by_byte(answer: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        for byte in await answer.read():
            yield bytes([byte])

    monkeypatch.setattr(aiohttp.StreamReader, "iter_any", byte_by_byte)
    client = await serve(handler)
    got = [line["status"] async for line in client.stream("POST", "/api/pull")]
    assert got == ["a", "b", "c"]


def test_split_lines() -> None:
    assert split_lines(b"a\n\n \nb\nc") == ([b"a", b"b"], b"c")
    assert split_lines(b"a\n") == ([b"a"], b"")
    assert split_lines(b"") == ([], b"")


async def test_leaving_a_stream_hangs_up(serve: Serve) -> None:
    gone = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b'{"status":"pulling"}\n')
                await asyncio.sleep(0.001)
        finally:
            gone.set()

    client = await serve(handler)
    stream = client.stream("POST", "/api/pull")
    assert await anext(stream) == {"status": "pulling"}
    await stream.aclose()
    async with asyncio.timeout(10):
        await gone.wait()


async def test_stream_errors(serve: Serve) -> None:
    bodies = iter([(b"not json\n", 200), (b'{"error":"no"}', 500), (b"x" * 2000, 200)])

    async def handler(request: web.Request) -> web.StreamResponse:
        body, status = next(bodies)
        return web.Response(body=body, status=status)

    client = await serve(handler)
    with pytest.raises(OllamaError, match="no JSON object"):
        _ = [line async for line in client.stream("POST", "/api/pull")]
    with pytest.raises(OllamaError, match="500: no"):
        _ = [line async for line in client.stream("POST", "/api/pull")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.ollama.client.LONGEST_LINE_BYTES", 1000)
        with pytest.raises(OllamaError, match="longer than 1000 bytes"):
            _ = [line async for line in client.stream("POST", "/api/pull")]


async def test_a_silent_stream_is_unreachable(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"status":"a"}\n')
        await asyncio.Event().wait()
        return response

    client = await serve(handler)
    got = []
    with pytest.raises(OllamaUnreachable):
        async for line in client.stream("POST", "/api/pull", idle_timeout_s=0.05):
            got.append(line)
    assert got == [{"status": "a"}]
