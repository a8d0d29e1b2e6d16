"""What the proxy adds to a direct connection: latency of a request, CPU of a request and of a streamed chunk.

One fake node (a process of its own) is asked directly and through ``sollol proxy``, in turn, in the same run;
quote the differences and ratios, not the single times of a shared machine.

    python scripts/bench_proxy.py [REQUESTS]
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent

STREAMS = 32
CHUNKS = 100
CHUNKS_PER_S = 100  #: of each stream: a small model on a good GPU
ROUNDS = 3
WARM_UP = 200
LIMIT_S = 60.0


def post(path: str, body: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


EMBED = post("/api/embed", '{"model":"embed","input":"hello"}')


def chat(tokens: int) -> bytes:
    options = f'{{"num_predict":{tokens}}}'
    return post("/api/generate", f'{{"model":"llama3.2","prompt":"[[n:{tokens}]] go","options":{options}}}')


class Connection:
    """A kept connection that reads whole answers by their framing, and nothing more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def ask(self, request: bytes) -> int:
        """Send a request, read its answer; the number of chunks (1 for a body with a length)."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise SystemExit(f"unexpected answer: {head!r}")
        if b"chunked" not in head:
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            await self.reader.readexactly(length)
            return 1
        chunks = 0
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            await self.reader.readexactly(size + 2)
            chunks += 1
        await self.reader.readexactly(2)
        return chunks


async def latencies(port: int, count: int) -> list[float]:
    """Seconds of each of ``count`` small requests on one connection."""
    connection = await Connection.open(port)
    times = []
    for index in range(WARM_UP + count):
        begun = time.perf_counter()
        await connection.ask(EMBED)
        if index >= WARM_UP:
            times.append(time.perf_counter() - begun)
    connection.writer.close()
    return times


async def streams(port: int) -> int:
    """Run the streams side by side; the number of chunks that came."""

    async def one() -> int:
        connection = await Connection.open(port)
        try:
            return await connection.ask(chat(CHUNKS))
        finally:
            connection.writer.close()

    return sum(await asyncio.gather(*(one() for _ in range(STREAMS))))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def start(*command: str) -> asyncio.subprocess.Process:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SOLLOL_", "OLLAMA_"))}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def until_up(port: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                connection = await Connection.open(port)
                await connection.ask(EMBED)
                await connection.ask(chat(1))
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
            else:
                return


def quantile(times: list[float], share: float) -> float:
    """Milliseconds."""
    return sorted(times)[int(len(times) * share)] * 1e3


def report(
    requests: int,
    direct: list[float],
    through: list[float],
    request_cpu: list[float],
    chunk_cpu: list[float],
    idle_share: float,
    process: psutil.Process,
) -> None:
    added_ms = quantile(through, 0.5) - quantile(direct, 0.5)
    chunk_us = statistics.median(chunk_cpu) * 1e6
    rows = [
        ("latency, direct, p50 / p99", f"{quantile(direct, 0.5):.3f} / {quantile(direct, 0.99):.3f} ms"),
        (
            "latency, through the proxy, p50 / p99",
            f"{quantile(through, 0.5):.3f} / {quantile(through, 0.99):.3f} ms",
        ),
        ("added latency, p50 (target 1.0)", f"{added_ms:.3f} ms"),
        ("CPU of the proxy, a small request", f"{statistics.median(request_cpu) * 1e6:.0f} µs"),
        ("CPU of the proxy, a streamed chunk", f"{chunk_us:.0f} µs (direct: 0)"),
        (f"CPU of the proxy, a {CHUNKS}-chunk stream", f"{chunk_us * CHUNKS / 1e3:.2f} ms (direct: 0)"),
        ("CPU of the idle proxy (one node, polled)", f"{idle_share * 100:.2f} % of a core"),
        ("memory of the proxy (RSS)", f"{process.memory_info().rss / 1e6:.0f} MB"),
    ]
    print(f"{requests} small requests on one kept connection, in turns with a direct one;")
    print(f"{STREAMS} streams of {CHUNKS} chunks at {CHUNKS_PER_S}/s each, their heads and ends included")
    for name, value in rows:
        print(f"  {name:42} {value}")


async def main(requests: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as state:
        await measure(requests, state)


async def measure(requests: int, state: str) -> None:
    node = await start(
        "-m", "tests.fakes.ollama_node", "--models", "llama3.2,embed", "--no-record", "--uvloop",
        "--time-scale", "1", "--load-bytes-s", str(10**15), "--unload-s", "0", "--prefill-tok-s", "1e9",
        "--neighbour-slowdown", "0", "--decode-tok-s", str(CHUNKS_PER_S), "--num-parallel", str(STREAMS),
        "--vram-bytes", str(40 << 30), "--default-num-ctx", "4096",
    )  # fmt: skip
    proxy = None
    try:
        assert node.stdout
        address = (await node.stdout.readline()).decode().strip()
        node_port = int(address.rpartition(":")[2])
        port = node_port + 1 if node_port < 65000 else node_port - 1
        proxy = await start(
            "-c", "from proxy_addon.cli import main; main()", "proxy", "--listen", f"127.0.0.1:{port}",
            "--nodes", address, "--state-dir", state, "--set", "discovery.mdns=false",
            "--set", "discovery.ollama_host=false",
        )  # fmt: skip
        await until_up(port)
        process = psutil.Process(proxy.pid)

        direct, through, request_cpu = [], [], []
        for _ in range(ROUNDS):
            direct += await latencies(node_port, requests // ROUNDS)
            before = cpu_s(process)
            through += await latencies(port, requests // ROUNDS)
            request_cpu.append((cpu_s(process) - before) / (requests // ROUNDS + WARM_UP))
        idle = cpu_s(process)
        await asyncio.sleep(3)
        idle_share = (cpu_s(process) - idle) / 3
        chunk_cpu = []
        for _ in range(ROUNDS):
            await streams(node_port)
            begun, before = time.perf_counter(), cpu_s(process)
            chunks = await streams(port)
            spent = cpu_s(process) - before - idle_share * (time.perf_counter() - begun)
            chunk_cpu.append(spent / chunks)
            if chunks < STREAMS * CHUNKS:
                raise SystemExit(f"chunks were lost or merged: {chunks} of {STREAMS * CHUNKS}")

        report(requests, direct, through, request_cpu, chunk_cpu, idle_share, process)
    finally:
        for child in (proxy, node):
            if child is not None and child.returncode is None:
                child.terminate()
                await child.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000))
