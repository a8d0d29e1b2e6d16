"""What every balancer must do before it is compared: pass pieces on as they come, and try another node.

Checked on two nodes that do what they are told to; no times are looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import aiohttp
import orjson
from bench_routing_client import Answer, Wrong
from bench_routing_subjects import Broken, Place, Subject, running

from tests.fakes.fake_agent import FakeAgent
from tests.fakes.faults import Fault, named
from tests.fakes.ollama_node import FakeModel, FakeOllama
from tests.sim.trace import Arrival

MODEL = FakeModel("llama3.2")
LIMIT_S = 20.0
CHUNKS = 3


def question(number: int) -> Arrival:
    """A chat with an answer of its own."""
    said = {"role": "user", "content": f"[[id:check-{number}]][[n:8]]"}
    return Arrival(f"check-{number}", 0.0, "check", "llama3.2", (said,), output_tokens=8)


async def check(subjects: Sequence[Subject], scratch: Path, speed: float) -> None:
    """Raise Broken if a subject does not do what it must. Each trial has fresh nodes and a fresh balancer."""
    for subject, trial in product(subjects, (streams, survives_errors, survives_loss)):
        if subject.command is None:
            continue
        folder = scratch / f"{trial.__name__}-{subject.name}"
        folder.mkdir()
        async with (
            FakeOllama([MODEL]) as one,
            FakeOllama([MODEL]) as other,
            FakeAgent(one) as agent,
            FakeAgent(other) as other_agent,
        ):
            places = [
                Place(node.host_port, its.url, node.spec.num_parallel)
                for node, its in ((one, agent), (other, other_agent))
            ]
            async with running(subject, places, folder, speed) as balancer:
                try:
                    async with asyncio.timeout(LIMIT_S * speed):
                        await trial(balancer.url, one, other)
                except (Wrong, TimeoutError, aiohttp.ClientError) as error:
                    raise Broken(f"{subject.title}: {trial.__doc__} ({error!r})") from error


async def streams(url: str, one: FakeOllama, other: FakeOllama) -> None:
    """The first pieces of an answer do not come before its end."""
    for node in (one, other):
        node.fail(Fault("hang", at="after_chunks", chunks=CHUNKS, path="/api/chat"))
    arrival, lines = question(0), 0
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + arrival.path, data=orjson.dumps(arrival.body())) as answer,
    ):
        while lines < CHUNKS:
            piece = await answer.content.readany()
            if not piece:
                raise Wrong("lost", "the answer ended")
            lines += piece.count(b"\n")


async def survives_errors(url: str, one: FakeOllama, other: FakeOllama) -> None:
    """A client notices that one of two nodes answers with errors, or nobody asked it."""
    one.fail(named("runner_stopped", path="/api/chat", times=None))
    await _all_answered(url)
    if not one.requests("/api/chat"):
        raise Wrong("lost", "it was not asked")


async def survives_loss(url: str, one: FakeOllama, other: FakeOllama) -> None:
    """A client notices that one of two nodes is gone."""
    await one.refuse()
    await _all_answered(url)


async def _all_answered(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(4):
            arrival, found = question(number), Answer()
            async with session.post(url + arrival.path, data=orjson.dumps(arrival.body())) as answer:
                found.status = answer.status
                found.add(await answer.read(), 0.0)
            found.judged(arrival)
