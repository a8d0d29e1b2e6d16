"""Prints how long a placement decision takes: python scripts/bench_decision.py [--profile].

Each fleet has 20 models; every node stores them all and has four of them resident, as reported by an agent.
``fresh`` decisions are the first after every node's report was replaced, as polls do each second.
"""

from __future__ import annotations

import cProfile
import pstats
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from time import thread_time

sys.path.insert(0, str(Path(__file__).parent.parent))

from agent.report import Gpu, Host, Model, Ollama, Report, Resident
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.placement.policies import POLICIES, decide
from proxy_addon.record import FinalStats

GIB = 1 << 30
MODELS = 20
NOW_S = 1000.0


def report(rng: random.Random) -> Report:
    free = rng.choice((6, 12, 20)) * GIB
    gpu = Gpu(
        index=0,
        name="GPU",
        vendor="nvidia",
        memory_total_bytes=24 * GIB,
        memory_free_bytes=free,
        memory_used_bytes=24 * GIB - free,
        memory_bandwidth_bytes_s=rng.choice((300e9, 600e9, 1000e9)),
    )
    host = Host(hostname="n", cpu_count=16, ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB)
    return Report(
        agent_version="0",
        node_id="n",
        sampled_at=datetime.now(UTC),
        sample_age_s=0,
        host=host,
        gpus=[gpu],
        ollama=Ollama(url="http://127.0.0.1:11434", reachable=True),
    )


def ask(model: int) -> Ask:
    endpoint = match("/api/chat")
    assert endpoint is not None
    return Ask(endpoint, f"m{model}", f"m{model}", stream=True, prompt_tokens=500)


def fleet(nodes: int, busy: float, rng: random.Random) -> tuple[Fleet, Speeds]:
    found, speeds = Fleet(), Speeds()
    day = datetime(2026, 1, 1, tzinfo=UTC)
    for index in range(nodes):
        node = found.add(Node(f"10.0.{index // 250}.{index % 250}", 11434, parallel=2))
        node.polled_s, node.report = NOW_S, report(rng)
        for model in range(MODELS):
            size = (2 + model % 5) * GIB
            node.models[f"m{model}"] = Model(
                name=f"m{model}", modified_at=day, size=size, digest=f"d{model}", details={"family": "llama"}
            )
        for model in rng.sample(range(MODELS), 4):
            size = (3 + model % 5) * GIB
            node.resident[f"m{model}"] = Resident(
                name=f"m{model}", size=size, size_vram=size, context_length=32_768
            )
            node.loaded_with[f"m{model}"] = ()
            rate = rng.uniform(20, 120)
            stats = FinalStats(500, 200, 0.0, 500 / (30 * rate), 200 / rate)
            speeds.observe(node, ask(model), stats, 0.3, 3.0, 1, NOW_S)
            while rng.random() < busy:
                node.take(ask(model), NOW_S - rng.uniform(0, 3), rng.uniform(1, 10))
    return found, speeds


def timed(call: Callable[..., object], repeat: int) -> list[float]:
    """CPU microseconds of each call."""
    times = []
    for _ in range(repeat):
        begun = thread_time()
        call()
        times.append((thread_time() - begun) * 1e6)
    return times


def show(label: str, times: list[float], target_us: float | None) -> None:
    times = sorted(times)
    p10, p50, p99 = (times[int(len(times) * share)] for share in (0.1, 0.5, 0.99))
    target = "" if target_us is None else f"   target {target_us:5.0f}"
    print(f"{label:42} p10 {p10:8.1f}   p50 {p50:8.1f}   p99 {p99:8.1f} µs{target}")


def main() -> None:
    rng = random.Random(1)
    print("CPU time; a disturbed machine shows it in the first line, about 10 µs on an idle desktop:")
    show("sum(range(1000))", timed(lambda: sum(range(1000)), 2000), None)
    for nodes, target_us in ((10, 50.0), (50, None), (1000, 1000.0)):
        repeat = 20_000 // nodes + 200
        for load, busy in (("idle", 0.0), ("busy", 0.5)):
            found, speeds = fleet(nodes, busy, rng)

            turns = count()
            asks = [ask(model) for model in range(MODELS)]

            def one(
                policy: str,
                found: Fleet = found,
                speeds: Speeds = speeds,
                turns: count[int] = turns,
                asks: list[Ask] = asks,
            ) -> None:
                turn = next(turns)
                decide(asks[turn % MODELS], found, speeds, NOW_S + turn * 1e-6, policy)

            timed(partial(one, "finish_time"), MODELS)
            for policy in POLICIES if load == "idle" else ("finish_time",):
                show(f"{policy}, {nodes} nodes, {load}", timed(partial(one, policy), repeat), target_us)
            fresh = []
            for turn in range(20):
                for node in found:
                    node.report = node.report and node.report.model_copy()
                fresh += timed(partial(decide, ask(turn), found, speeds, NOW_S + 2 + turn * 2), 1)
            show(f"finish_time, {nodes} nodes, {load}, fresh reports", fresh, None)
    if "--profile" in sys.argv:
        found, speeds = fleet(1000, 0.5, rng)
        with cProfile.Profile() as profile:
            for turn in range(200):
                decide(ask(turn % MODELS), found, speeds, NOW_S)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
