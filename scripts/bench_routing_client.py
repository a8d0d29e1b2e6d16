"""The clients: they send a trace's requests when they are due and look at every token that comes back.

Each client has a loopback address of its own, by which a balancer may tell clients apart. A chat's next turn
waits for the answer to the one before and sends it along, as an app would (the trace has it already: there
is one right answer, and the one that came is held against it). All times are the loop's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import orjson

from tests.fakes import tokens
from tests.fakes.engine import embedding
from tests.sim.trace import PAUSE_S, Arrival

Verdict = Literal["ok", "failed", "lost", "doubled", "mixed"]
#: Number of an arrival → the base URL to send it to.
Target = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times in seconds of the fleet's clock, ``at_s`` since the run's start."""

    at_s: float
    ttft_s: float
    total_s: float
    tokens: int
    verdict: Verdict
    why: str = ""


class Wrong(Exception):
    """An answer that is not the one that was asked for."""

    def __init__(self, verdict: Verdict, why: str) -> None:
        super().__init__(why)
        self.verdict: Verdict = verdict


def judged(text: str, prompt: str, limit: int | None) -> int:
    """How many tokens the answer to ``prompt`` has. Raises Wrong if it is not exactly that answer."""
    try:
        return tokens.check_stream(text, prompt, limit)
    except tokens.StreamError as error:
        words, tag = text.split(), tokens.tag_of(prompt)
        if any(word.rpartition("-")[0] != tag for word in words):
            raise Wrong("mixed", str(error)) from error
        raise Wrong("doubled" if len(set(words)) < len(words) else "lost", str(error)) from error


def vectors_judged(vectors: Sequence[Sequence[float]], texts: Sequence[str]) -> None:
    """Raise Wrong unless each text has its own vector; two numbers tell: the fakes' derive from the text."""
    if len(vectors) != len(texts):
        raise Wrong("lost" if len(vectors) < len(texts) else "doubled", f"{len(vectors)} vectors")
    for vector, text in zip(vectors, texts, strict=True):
        first, second = embedding(text, 2)
        if not math.isclose(vector[1] * first, vector[0] * second, rel_tol=1e-4, abs_tol=1e-9):
            raise Wrong("mixed", "a vector of another text")


class Answer:
    """A body as it comes in, parsed at once only until its first token is there."""

    def __init__(self) -> None:
        self.status = 0
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self._pieces: list[bytes] = []

    def add(self, piece: bytes, now_s: float) -> None:
        """Take the next piece."""
        self._pieces.append(piece)
        if self.status == 200 and self.first_s is None and any(map(_text, self._objects(whole=False))):
            self.first_s = now_s

    def judged(self, arrival: Arrival) -> int:
        """How many tokens it has. Raises Wrong if it is not the answer to ``arrival``, whole and unspoilt."""
        if self.status != 200:
            said = b"".join(self._pieces)[:200].decode(errors="replace")
            raise Wrong("failed", f"HTTP {self.status}: {said}")
        try:
            objects = self._objects(whole=True)
        except orjson.JSONDecodeError as error:
            raise Wrong("lost", "an object of the answer is broken") from error
        for one in objects:
            if "error" in one:
                raise Wrong("failed", str(one["error"]))
        if arrival.texts:
            vectors_judged(objects[0]["embeddings"], arrival.texts)
            return 0
        if not objects or not objects[-1].get("done"):
            raise Wrong("lost", "the answer ended without its last object")
        text = "".join(map(_text, objects))
        return judged(text, arrival.messages[-1]["content"], arrival.num_predict)

    def _objects(self, whole: bool) -> list[dict[str, Any]]:
        lines = b"".join(self._pieces).split(b"\n")
        return [orjson.loads(line) for line in (lines if whole else lines[:-1]) if line]


def _text(one: dict[str, Any]) -> str:
    message = one.get("message")
    return str(message.get("content", "") if message else one.get("response", ""))


class Clients:
    """All clients of one run."""

    def __init__(self, arrivals: Sequence[Arrival], target: Target, limit_s: float) -> None:
        self._arrivals, self._target = arrivals, target
        self._timeout = aiohttp.ClientTimeout(total=limit_s)
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._ended = {arrival.id: asyncio.Event() for arrival in arrivals}
        self._begun_s = 0.0

    async def play(self) -> list[Outcome]:
        """Send everything when it is due; the outcomes in the same order."""
        self._begun_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._due(number)) for number in range(len(self._arrivals))]
        finally:
            for session in self._sessions.values():
                await session.close()
        return [task.result() for task in tasks]

    async def _due(self, number: int) -> Outcome:
        arrival = self._arrivals[number]
        await asyncio.sleep(self._begun_s + arrival.at_s - asyncio.get_running_loop().time())
        if arrival.after is not None and not self._ended[arrival.after].is_set():
            await self._ended[arrival.after].wait()
            await asyncio.sleep(PAUSE_S)
        try:
            return await self._ask(number, arrival)
        finally:
            self._ended[arrival.id].set()

    async def _ask(self, number: int, arrival: Arrival) -> Outcome:
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        answer, count = Answer(), 0
        verdict: Verdict = "ok"
        why = ""
        try:
            await self._exchange(arrival, self._target(number), answer)
            count = answer.judged(arrival)
        except Wrong as error:
            verdict, why = error.verdict, str(error)
        except TimeoutError:
            verdict, why = "failed", f"no end within {self._timeout.total:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            verdict, why = "failed", f"{type(error).__name__}: {error}"
        ended_s = answer.ended_s or loop.time()
        first_s = answer.first_s or ended_s
        return Outcome(sent_s - self._begun_s, first_s - sent_s, ended_s - sent_s, count, verdict, why)

    async def _exchange(self, arrival: Arrival, url: str, answer: Answer) -> None:
        loop, body = asyncio.get_running_loop(), orjson.dumps(arrival.body())
        async with self._session(arrival.client).post(url + arrival.path, data=body) as response:
            answer.status = response.status
            async for piece in response.content.iter_any():
                answer.add(piece, loop.time())
            answer.ended_s = loop.time()

    def _session(self, client: str) -> aiohttp.ClientSession:
        if client not in self._sessions:
            high, low = divmod(len(self._sessions), 250)
            connector = aiohttp.TCPConnector(limit=0, local_addr=(f"127.1.{high}.{low + 1}", 0))
            self._sessions[client] = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._sessions[client]
