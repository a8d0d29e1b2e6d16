"""Web pages at a server that knows no login: which may ask, and what their browser is told."""

from collections.abc import Callable, Iterable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent import cors, pages

OURS = ("https://chat.example",)


@pytest.mark.parametrize(
    ("host", "origin", "checks_host", "sentence"),
    [
        ("127.0.0.1:11436", "", True, None),
        ("localhost:11436", "", True, None),
        ("[::1]:11436", "", True, None),
        ("gpu.local", "", True, None),
        ("", "", True, None),
        ("192.168.1.9:11436", "", True, None),
        ("evil.example:11436", "", True, "Host evil.example is not a name of this server"),
        ("evil.example:11436", "", False, None),
        # Rebound: to its browser it is a page of this very server.
        ("evil.example:1", "http://evil.example:1", True, "Host evil.example is not a name of this server"),
        ("gpu.lan:1", "http://gpu.lan:1", False, None),
        ("127.0.0.1:1", "http://evil.example", True, "pages of http://evil.example may not ask here"),
        ("127.0.0.1:1", "null", True, "pages of null may not ask here"),
        (
            "127.0.0.1:1",
            "http://localhost.evil.example",
            True,
            "pages of http://localhost.evil.example may not",
        ),
        ("127.0.0.1:1", "http://localhost:3000", True, None),
        ("127.0.0.1:1", "app://obsidian.md", True, None),
        ("127.0.0.1:1", "https://chat.example", True, None),
    ],
)
def test_who_may_ask(host: str, origin: str, checks_host: bool, sentence: str | None) -> None:
    origins = cors.DEFAULT_ORIGINS + OURS
    refused = pages.refusal(host, origin, checks_host=checks_host, origins=origins)
    if sentence is None:
        assert refused is None
    else:
        assert refused is not None and refused.startswith(sentence)


type Serve = Callable[[Iterable[str]], TestServer]


@pytest.fixture
def serve() -> Serve:
    """A server that streams, behind the check."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"x-plan": "1"})
        await response.prepare(request)
        await response.write(b"secret")
        return response

    def make(listens_on: Iterable[str]) -> TestServer:
        app = web.Application()
        app.router.add_post("/ask", stream)
        pages.keep_out(
            app,
            lambda _, sentence: web.Response(status=403, text=sentence),
            listens_on=listens_on,
            origins=OURS,
            exposed="x-plan",
        )
        return TestServer(app, host="127.0.0.1")

    return make


async def ask(url: object, method: str = "POST", **headers: str) -> tuple[int, str, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, str(url), headers=named) as answer,
    ):
        told = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, await answer.text(), told


async def test_what_a_browser_is_told(serve: Serve) -> None:
    async with serve(["127.0.0.1", "localhost"]) as server:
        url = server.make_url("/ask")
        status, text, told = await ask(url)
        assert (status, text) == (200, "secret")
        assert not [name for name in told if name.startswith("access-control")]
        status, text, told = await ask(url, origin=OURS[0])
        assert (status, text) == (200, "secret")
        assert told["access-control-allow-origin"] == OURS[0]
        assert (told["access-control-expose-headers"], told["vary"]) == ("x-plan", "Origin")
        asked = {"origin": OURS[0], "access_control_request_headers": "authorization"}
        status, _, told = await ask(url, "OPTIONS", **asked)
        assert (status, told["access-control-allow-headers"]) == (204, "authorization")
        assert told["access-control-allow-origin"] == OURS[0]
        for method in ("POST", "OPTIONS"):
            status, text, told = await ask(url, method, origin="https://evil.example")
            assert (status, text) == (403, "pages of https://evil.example may not ask here")
            assert "access-control-allow-origin" not in told
        assert (await ask(url, host="evil.example"))[0] == 403
        assert (await ask(server.make_url("/none"), host="evil.example"))[0] == 403


@pytest.mark.parametrize("listens_on", [["0.0.0.0"], ["127.0.0.1", "192.0.2.1"], ["::"], ["gpu.lan"]])
async def test_a_server_for_others_is_called_by_names_it_cannot_know(
    serve: Serve, listens_on: list[str]
) -> None:
    async with serve(listens_on) as server:
        assert (await ask(server.make_url("/ask"), host="gpu.example"))[0] == 200
        assert (await ask(server.make_url("/ask"), origin="https://evil.example"))[0] == 403
