"""What every proxy must do before it is measured: pass pieces on as they come, and all of them.

The node holds a stream until the first pieces have arrived; no times are looked at.
"""

from __future__ import annotations

import asyncio

import aiohttp
from bench_proxy_client import STAMP, Request
from bench_proxy_node import FIXED
from bench_proxy_subjects import Running
from bench_routing_subjects import Broken

LIMIT_S = 30.0
CHUNKS, HELD = 8, 3
#: A proxy that writes answers anew may look one piece ahead.
FIRST = HELD - 1


async def check(one: Running, node: str) -> None:
    """Raise Broken, in a sentence, if a subject does not do what it must."""
    try:
        async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
            await _answers(one, session)
            await _streams(one, session, node)
    except TimeoutError as error:
        raise Broken("it holds a stream's first pieces back") from error
    except aiohttp.ClientError as error:
        raise Broken(f"it breaks off ({error!r})") from error


async def _answers(one: Running, session: aiohttp.ClientSession) -> None:
    request = one.subject.api.small()
    async with _asked(one, session, request) as answer:
        body = await answer.read()
    if not one.subject.changes and body != FIXED[request.path.encode()]:
        raise Broken(f"it answers {body[:200]!r}")


async def _streams(one: Running, session: aiohttp.ClientSession, node: str) -> None:
    async with _asked(one, session, one.subject.api.stream(CHUNKS, 1000.0, HELD)) as answer:
        body = b""
        while len(STAMP.findall(body)) < FIRST:
            piece = await answer.content.readany()
            if not piece:
                raise Broken(f"a stream ends early: {body[:200]!r}")
            body += piece
        async with session.post(f"http://{node}/bench/release"):
            body += await answer.content.read()
    async with session.get(f"http://{node}/bench/last") as answer:
        sent = await answer.read()
    if STAMP.findall(body) != STAMP.findall(sent) or not (one.subject.changes or body == sent):
        raise Broken("it loses or changes pieces of a stream")


def _asked(
    one: Running, session: aiohttp.ClientSession, request: Request
) -> aiohttp.client._RequestContextManager:
    url, kind = f"http://127.0.0.1:{one.port}{request.path}", {"Content-Type": "application/json"}
    return session.post(url, data=request.body, headers=kind, raise_for_status=True)
