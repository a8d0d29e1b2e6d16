"""What watching a fleet costs: CPU of the proxy's side alone, for N nodes with M models and an agent each.

    python scripts/bench_watch.py [--nodes 50] [--models 50] [--seconds 20] [--no-agents] [--loop asyncio]

The nodes and agents are played by another process, which answers with ready-made bytes: only this process is
measured. Reports change with every answer, as they do in life; lists of models do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import uvloop

from agent.report import Gpu, Host, Model, Ollama, Report, Resident
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.watch import Watch
from proxy_addon.settings import Settings


def bodies(models: int) -> dict[str, bytes]:
    """Answers by path; the report's ``@@@@`` is replaced by a running number."""
    now = datetime.now(UTC)
    rows = [
        Model(
            name=f"model-{n}:8b-instruct-q4_K_M",
            model=f"model-{n}:8b-instruct-q4_K_M",
            modified_at=now,
            size=5_000_000_000 + n,
            digest=f"{n:064x}",
            details={"family": "llama", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"},
        )
        for n in range(models)
    ]
    resident = [
        Resident(name=row.name, size=row.size, size_vram=row.size, expires_at=now) for row in rows[:3]
    ]
    gpu = {"memory_total_bytes": 24 << 30, "memory_free_bytes": 1 << 30, "memory_used_bytes": 23 << 30}
    report = Report(
        agent_version="0.1.0",
        node_id="0123456789abcdef",
        sampled_at=now,
        sample_age_s=0.1234,
        host=Host(hostname="gpu", cpu_count=32, ram_total_bytes=1 << 37, ram_available_bytes=1 << 36),
        gpus=[Gpu(index=n, name="GPU", vendor="nvidia", **gpu) for n in range(2)],
        ollama=Ollama(url="http://127.0.0.1:11434", reachable=True, models=rows, resident=resident),
    )
    return {
        "/api/version": b'{"version":"0.33.0"}',
        "/api/tags": json.dumps({"models": [row.model_dump(mode="json") for row in rows]}).encode(),
        "/api/ps": json.dumps({"models": [row.model_dump(mode="json") for row in resident]}).encode(),
        "/api/show": b'{"model_info":{"general.architecture":"llama"}}',
        "/v1/report": report.model_dump_json().replace("0.1234", "0.@@@@").encode(),
    }


class Player(asyncio.Protocol):
    """A server that reads just enough of a request to answer it."""

    answers: dict[str, bytes]
    served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not data.startswith((b"GET ", b"POST ")):
            return  # the body of /api/show
        Player.served += 1
        path = data.split(b" ", 2)[1].decode()
        body = self.answers[path].replace(b"@@@@", b"%04d" % (Player.served % 10_000))
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


async def play(nodes: int, models: int) -> None:
    Player.answers = bodies(models)
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Player, "127.0.0.1", 0) for _ in range(nodes)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def measure(ports: list[int], options: argparse.Namespace) -> None:
    fleet = Fleet()
    for port in ports:
        fleet.add(
            Node("127.0.0.1", port, agent_url=None if options.no_agents else f"http://127.0.0.1:{port}")
        )
    settings = Settings.model_validate({"discovery": {"agents": False}})
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        watch = Watch(fleet, settings, lambda: session)
        cpu_s = time.process_time()
        watch.start()
        await watch.looked()
        print(f"first look at {len(ports)} nodes: {(time.process_time() - cpu_s) * 1e3:.0f} ms of CPU")
        await asyncio.sleep(3)
        begun_s, before = time.monotonic(), os.times()
        await asyncio.sleep(options.seconds)
        passed_s, after = time.monotonic() - begun_s, os.times()
        await watch.stop()
    assert all(node.polled_s for node in fleet)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    user, system = (after.user - before.user) / passed_s, (after.system - before.system) / passed_s
    fleet_is = (
        f"{len(ports)} nodes, {options.models} models each, {'no' if options.no_agents else 'with'} agents"
    )
    print(f"{fleet_is}, {options.loop}, {peak_mib:.0f} MiB at most")
    print(f"  {user + system:.2%} of a core ({user:.2%} user, {system:.2%} system),", end=" ")
    print(f"{(user + system) / len(ports) * 1e6:.0f} µs per node and second")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--no-agents", action="store_true")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--play", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        asyncio.run(play(options.nodes, options.models))
        return
    arguments = [
        sys.executable,
        __file__,
        "--play",
        "--nodes",
        str(options.nodes),
        "--models",
        str(options.models),
    ]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as player:
        assert player.stdout is not None
        ports = [int(port) for port in player.stdout.readline().split()]
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if options.loop == "uvloop" else None)
        with runner:
            runner.run(measure(ports, options))


if __name__ == "__main__":
    main()
