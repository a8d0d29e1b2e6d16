"""Prints what the addons' hooks cost a small request: python -O scripts/bench_hooks.py [--profile].

The chain of the product, in one process and without a socket: flows as a connection would make them go
through the events of a request that a node answers. The fleet has three idle nodes. Of each hook the median
is shown, of all together the CPU time without what it costs to measure each.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import orjson
import uvloop
from mitmproxy import connection, http
from mitmproxy.proxy.mode_specs import ProxyMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_decision import GIB, report

from agent.ollama import names
from agent.report import Model, Resident
from proxy_addon import record
from proxy_addon.fleet.node import Node
from proxy_addon.launcher import LeanMaster
from proxy_addon.relay import Tee
from proxy_addon.settings import Settings

MODEL = "llama3.2"
REQUESTS = 2000
EVENTS = ("requestheaders", "request", "responseheaders", "pieces", "response")
COLUMNS = (*EVENTS, "behind")
CLIENT_HEADERS = (  # of ollama-python
    (b"Host", b"127.0.0.1:11434"),
    (b"Accept-Encoding", b"gzip, deflate"),
    (b"Connection", b"keep-alive"),
    (b"Content-Type", b"application/json"),
    (b"Accept", b"application/json"),
    (b"User-Agent", b"ollama-python/0.5.1 (x86_64 linux) Python/3.13.1"),
)
DATE = (b"Date", b"Thu, 01 Jan 2026 00:00:00 GMT")


@dataclass(frozen=True)
class Case:
    """A request, and what a node answers."""

    path: str
    body: bytes
    content_type: bytes
    pieces: tuple[bytes, ...]

    def request(self) -> http.Request:
        """As it comes from a client."""
        length = (b"Content-Length", str(len(self.body)).encode())
        headers = http.Headers((*CLIENT_HEADERS, length))
        path, now_s = self.path.encode(), 0.0
        return http.Request(
            "", 0, b"POST", b"http", b"", path, b"HTTP/1.1", headers, self.body, None, now_s, now_s
        )

    def response(self) -> http.Response:
        """The head of the node's answer."""
        framing = (
            (b"Transfer-Encoding", b"chunked")
            if len(self.pieces) > 1
            else (b"Content-Length", str(len(self.pieces[0])).encode())
        )
        headers = http.Headers(((b"Content-Type", self.content_type), DATE, framing))
        return http.Response(b"HTTP/1.1", 200, b"OK", headers, None, None, 0.0, 0.0)


NUMBERS = {"total_duration": 30_000_000, "load_duration": 1_000_000, "prompt_eval_count": 9}
CHAT = {"model": MODEL, "created_at": "2026-01-01T00:00:00.000000Z"}
CASES = {
    "/api/embed": Case(
        "/api/embed",
        orjson.dumps({"model": MODEL, "input": "Why is the sky blue?"}),
        b"application/json; charset=utf-8",
        (orjson.dumps({"model": MODEL, "embeddings": [[0.01] * 64], **NUMBERS}),),
    ),
    "/api/chat, 3 pieces": Case(
        "/api/chat",
        orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}),
        b"application/x-ndjson",
        (
            *(
                orjson.dumps({**CHAT, "message": {"role": "assistant", "content": word}, "done": False})
                + b"\n"
                for word in ("It", " scatters")
            ),
            orjson.dumps(
                {
                    **CHAT,
                    "message": {"role": "assistant", "content": ""},
                    "done": True,
                    "done_reason": "stop",
                    **NUMBERS,
                    "prompt_eval_duration": 10_000_000,
                    "eval_count": 2,
                    "eval_duration": 15_000_000,
                }
            )
            + b"\n",
        ),
    ),
}


class Chain:
    """The proxy's addons over an idle fleet."""

    def __init__(self, state_dir: Path) -> None:
        nothing = {"mdns": False, "ollama_host": False, "localhost": False}
        self.master = LeanMaster(
            Settings.model_validate({"discovery": nothing, "state_dir": state_dir, "listen": "127.0.0.1:0"})
        )
        sollol = self.sollol = self.master.sollol
        for index in range(3):
            sollol.fleet.add(_node(index))
        sollol.ready.set()
        self.hooks: dict[str, list[Callable[[Any], Any]]] = {
            event: [hook for addon in self.master.addons.chain for hook in _hooks(addon, event)]
            for event in EVENTS
        }

    def flow(self, case: Case) -> http.HTTPFlow:
        """A new request on a connection."""
        client = connection.Client(
            peername=("127.0.0.1", 50_000),
            sockname=("127.0.0.1", 11_434),
            timestamp_start=0.0,
            proxy_mode=ProxyMode.parse("reverse:http://sollol.invalid:11434"),
        )
        flow = http.HTTPFlow(client, connection.Server(address=None), live=True)
        flow.request = case.request()
        return flow


def _node(index: int) -> Node:
    """One that has a few models on disk, and the asked one in memory."""
    node = Node(f"10.0.0.{index}", 11434, parallel=2)
    node.polled_s, node.report = asyncio.get_running_loop().time(), report(random.Random(index))
    for model in (MODEL, *(f"other{number}" for number in range(9))):
        key = names.canonical(model)
        node.models[key] = Model(
            name=model,
            modified_at=datetime(2026, 1, 1, tzinfo=UTC),
            size=GIB,
            digest=model,
            details={"family": "llama"},
        )
    key = names.canonical(MODEL)
    node.resident[key] = Resident(name=MODEL, size=GIB, size_vram=GIB, context_length=4096)
    node.loaded_with[key] = ()
    return node


def _hooks(addon: Any, event: str) -> list[Callable[[Any], Any]]:
    inner = [hook for each in getattr(addon, "addons", ()) for hook in _hooks(each, event)]
    hook = getattr(addon, event, None)
    hook = getattr(hook, "bare", hook)  # as lean_addons.py calls it
    return [hook, *inner] if callable(hook) else inner


def _label(hook: Callable[[Any], Any]) -> str:
    return type(getattr(getattr(hook, "__wrapped__", hook), "__self__", hook)).__name__


async def drive(
    chain: Chain, case: Case, flow: http.HTTPFlow, timed: dict[tuple[str, str], list[float]] | None
) -> None:
    """All events of one request. ``timed`` takes the seconds of each hook."""
    for event in EVENTS:
        if event == "responseheaders":
            flow.response = case.response()
        if event == "pieces":
            assert flow.response is not None and isinstance(flow.response.stream, Tee)
            begun = perf_counter()
            for piece in (*case.pieces, b""):
                flow.response.stream(piece)
            if timed is not None:
                timed[event, "Tee"].append(perf_counter() - begun)
            continue
        for hook in chain.hooks[event]:
            begun = perf_counter() if timed is not None else 0.0
            result = hook(flow)
            if result is not None:
                await result
            if timed is not None:
                timed[event, _label(hook)].append(perf_counter() - begun)
    begun = perf_counter()
    await asyncio.sleep(0)  # what comes behind the answer; one by one, as it is where no two end together
    if timed is not None:
        timed["behind", "Epilogue"].append(perf_counter() - begun)
    rec = record.of(flow)
    assert rec is not None and rec.outcome == "ok", rec


async def all_of(chain: Chain, case: Case, timed: dict[tuple[str, str], list[float]] | None = None) -> float:
    """CPU microseconds of each of :data:`REQUESTS`, by the quietest quarter of all hundreds of them."""
    spent_s = []
    for _ in range(REQUESTS // 100):
        flows = [chain.flow(case) for _ in range(100)]
        begun = thread_time()
        for flow in flows:
            await drive(chain, case, flow, timed)
        spent_s.append(thread_time() - begun)
        await asyncio.sleep(0)  # timers, and who was freed
    return statistics.quantiles(spent_s)[0] / 100 * 1e6


def yardstick_us() -> float:
    """What is divided by to compare machines, and one machine's hours."""
    times = []
    for _ in range(500):
        begun = thread_time()
        sum(range(1000))
        times.append(thread_time() - begun)
    return statistics.median(times) * 1e6


async def main() -> None:
    print(f"sum(range(1000)): {yardstick_us():.1f} µs (median; ~20 on the machine of docs/performance.md)")
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as state:
        chain = Chain(Path(state))
        for name, case in CASES.items():
            await all_of(chain, case)
            alone_us = min([await all_of(chain, case) for _ in range(3)])
            timed: dict[tuple[str, str], list[float]] = defaultdict(list)
            await all_of(chain, case, timed)
            print(f"\n{name}: {alone_us:.0f} µs of CPU")
            by_addon: dict[str, dict[str, float]] = defaultdict(dict)
            for (event, addon), times in timed.items():
                by_addon[addon][event] = statistics.median(times) * 1e6
            print(f"  {'':16}" + "".join(f"{event:>16}" for event in COLUMNS) + f"{'µs':>8}")
            for addon, parts in by_addon.items():
                cells = "".join(f"{parts[e]:16.1f}" if e in parts else " " * 16 for e in COLUMNS)
                print(f"  {addon:16}{cells}{sum(parts.values()):8.1f}")
            print(f"  {'':16}{'':{16 * len(COLUMNS)}}{sum(sum(p.values()) for p in by_addon.values()):8.1f}")
            if "--profile" in sys.argv:
                with cProfile.Profile() as profile:
                    await all_of(chain, case)
                pstats.Stats(profile).sort_stats("tottime").print_stats(60)
        await chain.sollol.journal.close()
    print(f"sum(range(1000)): {yardstick_us():.1f} µs")


if __name__ == "__main__":
    uvloop.run(main())
