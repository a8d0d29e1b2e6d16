"""Many clients as one process, told by lines on its input: ``go``, ``rest``; answers ``resting``.

    python -m tests.soak.clients http://127.0.0.1:21000 --clients 40 --seed 1 --out outcomes.jsonl

Each draws what it asks and how out of the seed. It repeats a request only where the port refused the
connection, as any client does while its server restarts, or where a kept connection was found closed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import aiohttp
import orjson

from tests.fakes.tokens import StreamError, check_stream
from tests.soak.house import EMBED, SHARES
from tests.soak.outcome import LIMIT_S, Manner, Outcome, Retry
from tests.soak.shapes import SHAPES, Reading, Shape, error_text

PAUSE_S = (0.5, 4.0)  #: between two requests of a client; longer where many would make more than this:
REQUESTS_PER_S = 25.0  #: of all together, which two cores carry with the nodes beside the proxy
FIRST_PAUSE_S = 3.0  #: within this all have begun
TOKENS = (1, 60)
LONG_TOKENS = (150, 400)  #: 4 ms each where nobody else is on the node: long enough to be hit
LONG_SHARE = 0.12
LEAVE_SHARE, SLOW_SHARE, FRESH_SHARE = 0.10, 0.08, 0.35
LEAVE_AFTER_S = 1.0
SLOW_PAUSE_S = 0.05
#: Of a slow reader's socket and reader, so that what it does not take is felt on the other side.
SLOW_BYTES = 4096
REFUSED_PAUSE_S = 0.1  #: until a refused connection is tried again


@dataclass(frozen=True)
class Wish:
    """One request to be made."""

    id: str
    shape: Shape
    model: str
    prompt: str
    manner: Manner
    leave_after_s: float
    fresh: bool


def wish(draw: Random, id_: str) -> Wish:
    """Draw a request."""
    model = draw.choices(list(SHARES), list(SHARES.values()))[0]
    shape = draw.choice([shape for shape in SHAPES if shape.embeds == (model == EMBED)])
    share = draw.random()
    manner: Manner = "stay"
    if share < LEAVE_SHARE:
        manner = "leave"
    elif share < LEAVE_SHARE + SLOW_SHARE and shape.piece is not None:
        manner = "slow"
    long = manner != "stay" or draw.random() < LONG_SHARE
    tokens = draw.randint(*(LONG_TOKENS if long else TOKENS))
    filler = "word " * draw.randint(0, 200)
    prompt = f"{filler}[[id:{id_}]] [[n:{tokens}]]"
    leave_after_s = draw.uniform(0.0, LEAVE_AFTER_S)
    return Wish(id_, shape, model, prompt, manner, leave_after_s, draw.random() < FRESH_SHARE)


class Client:
    """One client with a kept connection of its own, and a slow one for slow reading."""

    def __init__(self, url: str, name: str, draw: Random, pause_s: float, out: BinaryIO) -> None:
        self._url = url
        self._name = name
        self._draw = draw
        self._pause_s = pause_s
        self._out = out
        self._count = 0
        self._reused = False

    async def run(self, resting: asyncio.Event) -> None:
        """Ask, pause, ask, until it is time to rest."""
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(self._note_reuse)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), trace_configs=[tracing], timeout=aiohttp.ClientTimeout()
        ) as kept:
            pause_s = self._draw.uniform(0.0, FIRST_PAUSE_S)
            while not await _is_set_within(resting, pause_s):
                self._count += 1
                outcome = await self.ask(kept, wish(self._draw, f"{self._name}-{self._count}"))
                self._out.write(outcome.line())
                pause_s = self._draw.uniform(PAUSE_S[0], self._pause_s)

    async def _note_reuse(self, *_: object) -> None:
        self._reused = True

    async def ask(self, kept: aiohttp.ClientSession, wish_: Wish) -> Outcome:
        """Make one request and say what became of it."""
        outcome = Outcome(
            wish_.id, wish_.shape.name, wish_.model, wish_.manner, wish_.fresh, sent_s=time.monotonic()
        )
        leaving = wish_.manner == "leave"
        limit_s = wish_.leave_after_s if leaving else LIMIT_S
        try:
            async with asyncio.timeout(limit_s) as limit:
                if wish_.manner == "slow":
                    await self._slowly(wish_, outcome, limit)
                elif wish_.fresh:
                    connector = aiohttp.TCPConnector(force_close=True)
                    async with aiohttp.ClientSession(connector=connector) as session:
                        await self._attempts(session, wish_, outcome, limit)
                else:
                    await self._attempts(kept, wish_, outcome, limit)
        except TimeoutError:
            outcome.end = "left" if leaving else "hang"
        except StreamError as problem:
            outcome.end, outcome.detail = "wrong", str(problem)
        outcome.ended_s = time.monotonic()
        return outcome

    async def _slowly(self, wish_: Wish, outcome: Outcome, limit: asyncio.Timeout) -> None:
        connector = aiohttp.TCPConnector(force_close=True, socket_factory=_small_socket)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=SLOW_BYTES) as session:
            await self._attempts(session, wish_, outcome, limit)

    async def _attempts(
        self, session: aiohttp.ClientSession, wish_: Wish, outcome: Outcome, limit: asyncio.Timeout
    ) -> None:
        while True:
            self._reused = False
            try:
                return await self._attempt(session, wish_, outcome, limit)
            except aiohttp.ClientConnectorError as refused:
                if refused.os_error.errno != errno.ECONNREFUSED:
                    outcome.end, outcome.detail = "broken", repr(refused)
                    return
                outcome.retries.append(Retry("refused", time.monotonic()))
            except (aiohttp.ClientError, ConnectionError) as broken:
                if outcome.status is not None or not self._reused:
                    outcome.end = "broken" if outcome.status is None else "silent"
                    outcome.detail = repr(broken)
                    return
                outcome.retries.append(Retry("stale", time.monotonic()))
            await asyncio.sleep(REFUSED_PAUSE_S)

    async def _attempt(
        self, session: aiohttp.ClientSession, wish_: Wish, outcome: Outcome, limit: asyncio.Timeout
    ) -> None:
        shape = wish_.shape
        body = orjson.dumps(shape.request(wish_.model, wish_.prompt))
        headers = {"content-type": "application/json"}
        timeout = aiohttp.ClientTimeout()  # no limit of aiohttp's own: ours is around all of it
        async with session.post(
            self._url + shape.path, data=body, headers=headers, timeout=timeout
        ) as answer:
            outcome.first_byte_s, outcome.status = time.monotonic(), answer.status
            outcome.node = answer.headers.get("x-sollol-node", "")
            outcome.attempts = int(answer.headers.get("x-sollol-attempts", 0))
            outcome.request_id = answer.headers.get("x-sollol-request-id", "")
            if answer.status != 200:
                self._failed(shape, await answer.read(), outcome)
            elif shape.piece is None:
                outcome.tokens = shape.check(await answer.read(), wish_.prompt)
                outcome.end = "ok"
            else:
                await self._stream(answer, wish_, outcome, limit)

    def _failed(self, shape: Shape, body: bytes, outcome: Outcome) -> None:
        outcome.end = "failed"
        try:
            text = error_text(shape.protocol, orjson.loads(body))
        except ValueError:
            text = None
        if text is None:
            raise StreamError(f"HTTP {outcome.status} without an error of its protocol: {body[:200]!r}")
        outcome.detail = text

    async def _stream(
        self, answer: aiohttp.ClientResponse, wish_: Wish, outcome: Outcome, limit: asyncio.Timeout
    ) -> None:
        reading = Reading(wish_.shape)
        try:
            async for data in answer.content.iter_any():
                reading.feed(data)
                if wish_.manner == "slow":
                    await asyncio.sleep(SLOW_PAUSE_S)
                    outcome.slept_s += SLOW_PAUSE_S
                    due_s = limit.when()
                    limit.reschedule(None if due_s is None else due_s + SLOW_PAUSE_S)
        finally:
            # Whatever ended it: what came until then must be right.
            outcome.tokens = check_stream(reading.text, wish_.prompt, complete=False)
        reading.end()
        if reading.error is not None:
            outcome.end, outcome.detail = "cut", reading.error
        elif reading.done:
            outcome.tokens = check_stream(reading.text, wish_.prompt)
            outcome.end = "ok"
        else:
            outcome.end, outcome.detail = "silent", "the stream ended without its last object"


def _small_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BYTES)
    return made


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _run(options: argparse.Namespace) -> None:
    orders, resting, act = await _lines(), asyncio.Event(), 0
    clients: list[asyncio.Task[None]] = []
    pause_s = max(PAUSE_S[1], 2 * options.clients / REQUESTS_PER_S)
    with Path(options.out).open("ab") as out:
        while order := (await orders.readline()).decode().strip():
            if order == "go":
                act += 1
                resting.clear()
                draws = [Random(f"{options.seed}/{act}/{n}") for n in range(options.clients)]
                made = [Client(options.url, f"{act}.{n}", d, pause_s, out) for n, d in enumerate(draws)]
                clients = [asyncio.create_task(client.run(resting)) for client in made]
            else:
                resting.set()
                await asyncio.gather(*clients)
                out.flush()
                print("resting", flush=True)


def main() -> None:
    """Ask until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--out", required=True)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
