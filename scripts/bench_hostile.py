"""What hostile clients cost the others: latency of well-behaved ones alone, and beside each attack.

    python scripts/bench_hostile.py [--seconds 5] [--only WORD] [--no-splice]

Fake nodes that answer after 20 ms, `sollol proxy` and every attack are processes of their own on loopback,
and all share this machine's processors: what an attack's own process takes counts against the proxy. An
attack is as wide as its line says, and as fast as it gets answers, but for a pause. The well-behaved send 40
requests a second. Printed is p50 and p99 of these, and the ratio to those measured just before the attack.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hostile import behaviours, bodies, forms, framing, heads
from tests.hostile.process import Proxy, proxy_process
from tests.hostile.wire import BOUND_S, converse

RATE_S = 40.0
SLOTS = 64
OTHER = (
    "other"  #: a model of a second node, so that streams which are not read take no slot of the well-behaved
)
VRAM_BYTES = 1 << 40  #: so that the context of every slot fits
CHAT: dict[str, Any] = {
    "model": "llama3.2",
    "stream": False,
    "messages": [{"role": "user", "content": "[[n:1]] hi"}],
}
NODE = ("-m", "tests.fakes.ollama_node", "--port", "0", "--no-record", "--uvloop", "--time-scale", "1")

Behave = Callable[[int], Awaitable[object]]


@dataclass(frozen=True)
class Attack:
    """``connections`` clients that do ``behave`` again and again, with a pause between."""

    name: str
    connections: int
    behave: Behave
    pause_s: float = 0.05


def sent(*attacks: bytes) -> Behave:
    """Send these in turn, each on a connection of its own, and read to the end."""
    turn = iter(range(1 << 60))

    async def behave(port: int) -> None:
        await converse(port, attacks[next(turn) % len(attacks)])

    return behave


async def idle(port: int) -> None:
    """A connection, and no more."""
    async with behaviours.connected(port):
        await asyncio.sleep(BOUND_S - 1)


async def reads_nothing(port: int) -> None:
    """A long stream that is not read."""
    body = {"model": OTHER, "messages": [{"role": "user", "content": "[[n:100000]]"}]}
    async with behaviours.connected(port) as (_, writer):
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(forms.sized(orjson.dumps(body)))
        await asyncio.sleep(BOUND_S - 1)


async def pipelines(port: int) -> None:
    """A thousand requests in one go, none of whose answers is read."""
    async with behaviours.connected(port) as (_, writer):
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(forms.head("GET /api/version HTTP/1.1") * 1000)
        await asyncio.sleep(1)


def _text(megabytes: int) -> bytes:
    words = b"lorem ipsum dolor sit amet " * (megabytes * forms.MIB // 27)
    return forms.sized(orjson.dumps({**CHAT, "model": "none", "prompt": words.decode()}))


def table() -> tuple[Attack, ...]:
    """The attacks. Made where they are carried out, for some are large."""
    plain = [
        a.sent for a in (*framing.LENGTHS, *framing.CODINGS, *framing.CHUNKS, *heads.SYNTAX, *heads.TARGETS)
    ]
    quick = [raw for raw in plain if len(raw) < 1 << 16]
    close = forms.LAST
    dense = forms.sized(b'{"model":"none","messages":[' + b"[]," * (20 * forms.MIB // 3) + b"[]]}")
    deep = [a.sent for a in bodies.BODIES if "deep" in a.name]
    bombs = [a.sent for a in bodies.BODIES if "bomb" in a.name]
    fine = forms.chunked(*([b"a"] * forms.MIB)) + close
    return (
        Attack("smuggling and broken heads", 8, sent(*quick)),
        Attack("slow heads", 1000, behaviours.slow_head),
        Attack("slow bodies", 1000, behaviours.half_a_body),
        Attack("10,000 idle connections", 10_000, idle, pause_s=10),
        Attack("giant heads", 8, sent(*(a.sent for a in heads.GIANTS))),
        Attack("JSON nested 100,000 deep", 8, sent(*deep)),
        Attack("20 MB of empty lists", 2, sent(dense + close)),
        Attack(
            "1 MB of empty lists", 4, sent(forms.sized(b"[" + b"[]," * (forms.MIB // 3) + b"[]]") + close)
        ),
        Attack("100 MB of text", 1, sent(_text(99) + close)),
        Attack("zstd bombs", 8, sent(*bombs)),
        Attack("1 MB in chunks of one byte", 2, sent(fine)),
        Attack("1,000 pipelined, not read", 2, pipelines),
        Attack("streams that nobody reads", 32, reads_nothing),
        Attack("uploads broken off", 8, behaviours.reset_in_a_body),
    )


async def attack(name: str, port: int) -> None:
    """Carry out one attack until the process is ended."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    behaviours.TRICKLE_S = 1.0
    chosen = next(a for a in table() if a.name == name)

    async def again(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            with suppress(OSError, TimeoutError, AssertionError):
                await chosen.behave(port)
            await asyncio.sleep(chosen.pause_s)

    many = [asyncio.create_task(again(i / chosen.connections)) for i in range(chosen.connections)]
    print("begun", flush=True)
    await asyncio.gather(*many)


async def well_behaved(proxy: Proxy, seconds: float) -> list[float]:
    """The latencies in milliseconds of requests that come at an even rate."""
    latencies: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            begun_s = time.perf_counter()
            async with session.post(f"{proxy.url}/api/chat", json=CHAT) as answer:
                said = await answer.text()
                assert answer.status == 200, said
            latencies.append((time.perf_counter() - begun_s) * 1e3)

        asked: list[asyncio.Task[None]] = []
        begun_s = time.perf_counter()
        while (due_s := len(asked) / RATE_S) < seconds:
            await asyncio.sleep(begun_s + due_s - time.perf_counter())
            asked.append(asyncio.create_task(one()))
        await asyncio.gather(*asked)
    return latencies


def _row(name: str, alone: list[float], beside: list[float]) -> str:
    cells = []
    for quantile in (50, 99):
        before, after = (statistics.quantiles(sample, n=100)[quantile - 1] for sample in (alone, beside))
        cells.append(f"{before:7.1f} | {after:7.1f} | {after / before:5.2f}")
    return f"| {name:<28} | {' | '.join(cells)} |"


async def _node(stack: AsyncExitStack, model: str) -> dict[str, object]:
    """Start a node that holds ``model``."""
    size = ("--num-parallel", str(SLOTS), "--vram-bytes", str(VRAM_BYTES))
    node = await asyncio.create_subprocess_exec(
        sys.executable, *NODE, "--models", model, *size, stdout=asyncio.subprocess.PIPE
    )
    stack.callback(node.terminate)
    assert node.stdout is not None
    host, _, port = (await node.stdout.readline()).decode().strip().rpartition(":")
    return {"host": host, "port": int(port), "parallel": SLOTS}


async def measure(options: argparse.Namespace) -> None:
    """Print the table."""
    names = [a.name for a in table() if options.only in a.name]
    async with AsyncExitStack() as stack:
        nodes = [await _node(stack, model) for model in (CHAT["model"], OTHER)]
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sollol-bench-"))
        proxy = await stack.enter_async_context(
            proxy_process(Path(folder), nodes, splice=not options.no_splice)
        )
        await well_behaved(proxy, 2)
        print("| beside                       | p50 ms |  beside |   × | p99 ms |  beside |   × |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name in names:
            alone = await well_behaved(proxy, options.seconds)
            hostile = await asyncio.create_subprocess_exec(
                sys.executable, __file__, "--attack", name, "--port", str(proxy.port),
                stdout=asyncio.subprocess.PIPE, env={**os.environ},
            )  # fmt: skip
            assert hostile.stdout is not None
            try:
                await hostile.stdout.readline()
                await asyncio.sleep(1)  # until its connections are there
                beside = await well_behaved(proxy, options.seconds)
            finally:
                hostile.kill()
                await hostile.wait()
            print(_row(name, alone, beside), flush=True)


def main() -> None:
    """Measure, or be one of the attacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--only", default="", help="attacks with this in their name")
    parser.add_argument("--no-splice", action="store_true", help="by mitmproxy's layers alone")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    uvloop.run(attack(options.attack, options.port) if options.attack else measure(options))


if __name__ == "__main__":
    main()
