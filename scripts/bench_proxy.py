"""What the proxy adds to a direct connection: latency of a request, CPU of a request and of a streamed chunk.

One fake node (a process of its own) is asked directly and through ``sollol proxy``, in turn, in the same run;
quote the differences and ratios, not the single times of a shared machine.

    python scripts/bench_proxy.py [REQUESTS]

mitmdump with an addon that does nothing but stream is measured beside it, as what the proxy is built on.
"""

import asyncio
import os
import socket
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
STREAMING = "def responseheaders(flow):\n    flow.response.stream = True\n"


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


def yardstick_us() -> float:
    """How fast this machine is just now: ``sum(range(1000))``, about 10 µs on an idle desktop of 2024."""
    begun = time.perf_counter()
    for _ in range(1000):
        sum(range(1000))
    return (time.perf_counter() - begun) * 1e3


class Subject:
    """A proxy under test and what it cost."""

    def __init__(self, name: str, child: asyncio.subprocess.Process, port: int) -> None:
        self.name, self.port, self.child = name, port, child
        self.process = psutil.Process(child.pid)
        self.times: list[float] = []
        self.request_s: list[float] = []
        self.chunk_s: list[float] = []
        self.idle_share = 0.0

    async def small_requests(self, count: int) -> None:
        before = cpu_s(self.process)
        self.times += await latencies(self.port, count)
        self.request_s.append((cpu_s(self.process) - before) / (count + WARM_UP))

    async def idle(self, seconds: float) -> None:
        before = cpu_s(self.process)
        await asyncio.sleep(seconds)
        self.idle_share = (cpu_s(self.process) - before) / seconds

    async def stream(self) -> None:
        begun, before = time.perf_counter(), cpu_s(self.process)
        chunks = await streams(self.port)
        if chunks < STREAMS * CHUNKS:
            raise SystemExit(f"chunks were lost or merged: {chunks} of {STREAMS * CHUNKS}")
        spent_s = cpu_s(self.process) - before - self.idle_share * (time.perf_counter() - begun)
        self.chunk_s.append(spent_s / chunks)

    def row(self, direct: list[float]) -> str:
        p50, p99 = quantile(self.times, 0.5), quantile(self.times, 0.99)
        request_us = statistics.median(self.request_s) * 1e6
        chunk_us = statistics.median(self.chunk_s) * 1e6
        return (
            f"{self.name:22}{p50:9.3f}{p99:9.3f}{p50 - quantile(direct, 0.5):10.3f}{request_us:13.0f}"
            f"{chunk_us:10.0f}{self.idle_share * 100:8.2f}{self.process.memory_info().rss / 1e6:8.0f}"
        )


async def main(requests: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as state:
        await measure(requests, Path(state))


async def measure(requests: int, state: Path) -> None:
    children = []
    try:
        node = await start(
            "-m", "tests.fakes.ollama_node", "--models", "llama3.2,embed", "--no-record", "--uvloop",
            "--time-scale", "1", "--load-bytes-s", str(10**15), "--unload-s", "0", "--prefill-tok-s", "1e9",
            "--neighbour-slowdown", "0", "--decode-tok-s", str(CHUNKS_PER_S), "--num-parallel", str(STREAMS),
            "--vram-bytes", str(40 << 30), "--default-num-ctx", "4096",
        )  # fmt: skip
        children.append(node)
        assert node.stdout
        address = (await node.stdout.readline()).decode().strip()
        node_port = int(address.rpartition(":")[2])
        script = state / "streaming.py"
        script.write_text(STREAMING)
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = one.getsockname()[1], other.getsockname()[1]
        commands = {
            "sollol proxy": (
                "-c", "from proxy_addon.cli import main; main()", "proxy",
                "--listen", f"127.0.0.1:{ports[0]}", "--nodes", address, "--state-dir", str(state),
                "--set", "discovery.mdns=false", "--set", "discovery.ollama_host=false",
            ),
            "mitmdump, 2-line addon": (
                "-c", "from mitmproxy.tools.main import mitmdump; mitmdump()", "-q", "-s", str(script),
                "--mode", f"reverse:http://{address}@127.0.0.1:{ports[1]}", "--set", f"confdir={state}",
            ),
        }  # fmt: skip
        subjects = []
        for (name, command), port in zip(commands.items(), ports, strict=True):
            children.append(await start(*command))
            await until_up(port)
            subjects.append(Subject(name, children[-1], port))

        direct: list[float] = []
        for _ in range(ROUNDS):
            direct += await latencies(node_port, requests // ROUNDS)
            for subject in subjects:
                await subject.small_requests(requests // ROUNDS)
        for subject in subjects:
            await subject.idle(3)
        for _ in range(ROUNDS):
            for subject in subjects:
                await subject.stream()
        report(requests, direct, subjects)
    finally:
        for child in reversed(children):
            if child.returncode is None:
                child.terminate()
                await child.wait()


def report(requests: int, direct: list[float], subjects: list[Subject]) -> None:
    print(f"{requests} small requests on one kept connection, in turns with a direct one (ms);")
    print(f"{STREAMS} streams of {CHUNKS} chunks at {CHUNKS_PER_S}/s each, heads and ends included;")
    print(f"this machine, just now: sum(range(1000)) in {yardstick_us():.1f} µs")
    print(f"{'':22}{'p50':>9}{'p99':>9}{'added':>10}{'CPU µs/req':>13}{'/chunk':>10}{'idle %':>8}{'MB':>8}")
    print(f"{'direct':22}{quantile(direct, 0.5):9.3f}{quantile(direct, 0.99):9.3f}")
    for subject in subjects:
        print(subject.row(direct))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000))
