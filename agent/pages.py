"""Keeps web pages from a server that knows no login: one that a browser shows may not ask it in its name.

A page elsewhere is told by its Origin (``agent/cors.py``), one whose name was rebound to this machine by its
Host (``agent/host_header.py``). Programs send no Origin, and the Host that they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from agent import cors, host_header

type Refuse = Callable[[web.Request, str], web.Response]


def refusal(host: str, origin: str, *, checks_host: bool, origins: Sequence[str]) -> str | None:
    """Why a request with these headers is refused, in one sentence; None where it is not.

    ``origins`` are patterns of pages that may ask; a page of this very server may always.
    """
    name = host_header.name_of(host)
    if checks_host and not host_header.is_own(name):
        return f"Host {name} is not a name of this server"
    if origin and not cors.same_origin(origin, host) and not cors.admitted(origin, origins):
        return f"pages of {origin} may not ask here"
    return None


def keep_out(
    app: web.Application,
    refuse: Refuse,
    *,
    listens_on: Iterable[str],
    origins: Iterable[str] = (),
    exposed: str = "",
) -> None:
    """Let only those pages ask ``app`` that may, before anything else looks at the request.

    Args:
        app: the application, which is not running yet.
        refuse: makes the answer 403 of a sentence.
        listens_on: the hosts that the server listens on.
        origins: patterns of pages that may ask, besides Ollama's defaults.
        exposed: the headers of answers that such pages may read, comma-separated.
    """
    patterns = (*cors.DEFAULT_ORIGINS, *origins)
    checks_host = all(map(host_header.is_loopback, listens_on))

    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin", "")
        sentence = refusal(host, origin, checks_host=checks_host, origins=patterns)
        if sentence is not None:
            return refuse(request, sentence)
        if request.method == "OPTIONS":
            asked = request.headers.get("Access-Control-Request-Headers", "")
            return web.Response(status=204, headers=cors.preflight_headers(origin, asked) if origin else {})
        return await handler(request)

    async def tell_browser(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin", "")
        if request.method != "OPTIONS" and cors.admitted(origin, patterns):
            response.headers.update(cors.answer_headers(origin, exposed))

    app.middlewares.insert(0, admit)
    app.on_response_prepare.append(tell_browser)
