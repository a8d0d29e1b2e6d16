"""One generation on a node, the same for every HTTP surface: runner, slot, prefill, tokens, statistics."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Any, Literal

from tests.fakes import tokens
from tests.fakes.clock import clock_ns
from tests.fakes.machine import Runner, Slot
from tests.fakes.scheduler import FOREVER_S, Scheduler
from tests.fakes.store import FakeModel

Kind = Literal["thinking", "text", "tool"]
Piece = tuple[Kind, str]
CHARACTERS_PER_TOKEN = 4

_GO_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_GO_TERM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


class ApiError(Exception):
    """An error answer: ``status`` and Ollama's text; each surface gives it its own shape."""

    def __init__(self, status: int, text: str, **fields: str) -> None:
        super().__init__(text)
        self.status, self.text, self.fields = status, text, fields


def keep_alive_s(value: object) -> float | None:
    """Return a request's keep_alive in seconds, ``None`` if it names none; raises ApiError(400).

    A number is seconds, a string a Go duration (which needs a unit); negative is forever.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FOREVER_S if value < 0 else float(value)
    if not isinstance(value, str):
        raise ApiError(400, f"Unsupported type: '{type(value).__name__}'")
    if value in ("0", "+0", "-0"):
        return 0.0
    sign, digits = (-1, value[1:]) if value[:1] == "-" else (1, value.removeprefix("+"))
    terms = _GO_TERM.findall(digits)
    if not terms or "".join(a + b for a, b in terms) != digits:
        problem = "missing unit in" if re.fullmatch(r"\d+(\.\d*)?", digits) else "invalid"
        raise ApiError(400, f'time: {problem} duration "{value}"')
    seconds = sign * sum(float(number) * _GO_UNITS_S[unit] for number, unit in terms)
    return FOREVER_S if seconds < 0 else seconds


@dataclass
class Job:
    """What a request wants generated."""

    model: FakeModel
    name: str
    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_alive_s: float | None = None
    limit: int | None = None
    think: bool = False
    tool: Mapping[str, Any] | None = None
    images: int = 0
    answer_turn: str = ""  # what a template puts between a prompt and its answer, where it keeps them


@dataclass
class Stats:
    """Ollama's final statistics."""

    started_ns: int
    load_ns: int = 0
    prompt_count: int = 0
    prompt_ns: int = 0
    eval_count: int = 0
    eval_ns: int = 0
    done_reason: str = "stop"

    def fields(self) -> dict[str, int]:
        """Return them under their names in the native API."""
        return {
            "total_duration": clock_ns() - self.started_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_count,
            "prompt_eval_duration": self.prompt_ns,
            "eval_count": self.eval_count,
            "eval_duration": self.eval_ns,
        }


def tool_arguments(tool: Mapping[str, Any], tag: str) -> dict[str, Any]:
    """Return arguments for a call of ``tool``: each required (or else the first) property gets the tag."""
    schema = tool.get("parameters") or tool.get("input_schema") or {}
    properties = schema.get("properties") or {}
    names = schema.get("required") or list(properties)[:1]
    return dict.fromkeys(names, tag)


def embedding(text: str, dimensions: int) -> list[float]:
    """Return a vector that is a function of the text alone, not normalised."""
    random = Random(hashlib.sha256(text.encode()).digest())
    return [random.uniform(-1, 1) for _ in range(dimensions)]


def normalised(vector: list[float]) -> list[float]:
    """Return the vector at length one."""
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


def count_tokens(text: str) -> int:
    """Return how many tokens a prompt is."""
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


class Generation:
    """A job on its runner, from ``async with`` (load, slot, prefill) over :meth:`pieces` to the end."""

    def __init__(self, scheduler: Scheduler, job: Job) -> None:
        self.job = job
        self.tag = tokens.tag_of(job.prompt)
        self.stats = Stats(started_ns=clock_ns())
        self._scheduler = scheduler
        self._runner: Runner | None = None
        self._slot: Slot | None = None

    async def __aenter__(self) -> Generation:
        job, stats, scheduler = self.job, self.stats, self._scheduler
        runner = await scheduler.acquire(job.model, job.name, job.options, job.keep_alive_s)
        self._runner = runner
        try:
            stats.load_ns = clock_ns() - stats.started_ns
            self._slot, cached = await runner.take_slot(job.prompt)
            runner.decoding += 1
            runner.notice()
            stats.prompt_count = count_tokens(job.prompt)
            evaluated = max(1, stats.prompt_count - cached // CHARACTERS_PER_TOKEN)
            prefill_s = scheduler.prefill_s(runner, evaluated)
            await scheduler.sleep(prefill_s)
            stats.prompt_ns = self._reported_ns(prefill_s)
        except BaseException:
            self._give_back()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _reported_ns(self, seconds: float) -> int:
        """Return a duration of the modelled machine; the test machine's lateness is no speed of a node."""
        return max(1, round(seconds * self._scheduler.spec.time_scale * 1e9))

    def _give_back(self) -> None:
        runner, self._runner = self._runner, None
        slot, self._slot = self._slot, None
        if runner is not None:
            if slot is not None:
                runner.decoding -= 1
                slot.text += self.job.answer_turn + self._written()
                runner.give_slot(slot)
            self._scheduler.release(runner)

    def _written(self) -> str:
        """Return the text generated so far: it stays in the cache behind the prompt."""
        if self.job.tool is not None:
            return ""
        thought = tokens.THINKING_TOKENS if self.job.think else 0
        return "".join(tokens.token(self.tag, i) for i in range(self.stats.eval_count - thought))

    def _all_pieces(self) -> list[Piece]:
        job, stats = self.job, self.stats
        pieces: list[Piece] = []
        if job.think:
            tag = tokens.thinking_tag(self.tag)
            pieces += [("thinking", tokens.token(tag, i)) for i in range(tokens.THINKING_TOKENS)]
        if job.tool is not None:
            pieces.append(("tool", ""))
        else:
            count, stats.done_reason = tokens.length_of(job.prompt, job.limit)
            pieces += [("text", tokens.token(self.tag, i)) for i in range(count)]
        return pieces

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield the pieces as they fall due; several at once where the loop came late."""
        runner, scheduler = self._runner, self._scheduler
        assert runner is not None
        loop = asyncio.get_running_loop()
        pieces = self._all_pieces()
        stats, spent_s, done = self.stats, 0.0, 0
        deadline = loop.time()
        while done < len(pieces):
            token_s = scheduler.token_s(runner)
            step_s = token_s * scheduler.spec.time_scale
            if step_s <= 0:
                due = len(pieces)
            else:
                due = min(done + scheduler.spec.token_batch, len(pieces)) if done else 1
                deadline += (due - done) * step_s
                late_s = loop.time() - deadline
                if late_s < 0:
                    await asyncio.sleep(-late_s)
                else:
                    late = int(late_s / step_s)
                    due, deadline = due + late, deadline + late * step_s
            if not scheduler.tokens_go_on.is_set():
                await scheduler.tokens_go_on.wait()
                deadline = loop.time()
            batch = pieces[done:due]
            done, spent_s = done + len(batch), spent_s + len(batch) * token_s
            stats.eval_count, stats.eval_ns = done, self._reported_ns(spent_s)
            yield batch

    async def whole(self) -> tuple[str, str]:
        """Return thinking and text of the whole answer, for those who do not stream."""
        texts: dict[Kind, list[str]] = {"thinking": [], "text": [], "tool": []}
        async for batch in self.pieces():
            for kind, text in batch:
                texts[kind].append(text)
        return "".join(texts["thinking"]), "".join(texts["text"])

    def tool_call(self) -> tuple[str, str, dict[str, Any]]:
        """Return id, name and arguments of the call that answers a request with tools."""
        assert self.job.tool is not None
        return f"call_{self.tag}", str(self.job.tool.get("name")), tool_arguments(self.job.tool, self.tag)
