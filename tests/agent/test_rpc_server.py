"""rpc-servers as an agent runs them: real ones, and a stand-in where a GPU or a nosy caller is needed."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent import llama_cpp, metrics, rpc_server
from agent.gpu import NoGpu
from agent.host import HostReader
from agent.llama_cpp import GgmlDevice
from agent.ollama.client import OllamaClient
from agent.report import Gpu, GpuProcess, Host, Ollama, Report, Rpc
from agent.rpc_server import CannotServe, RpcProcess, RpcServers, devices, match
from agent.sampler import Sampler

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
HOST = Host(hostname="here", cpu_count=2, ram_total_bytes=32 * GIB, ram_available_bytes=20 * GIB)

# Listens, tells how it was started, and tells of everyone who connects.
STAND_IN = """
import json, os, socket, sys
if "?" in sys.argv:
    print(os.environ["LISTING"])
    sys.exit(1)
told = open(os.environ["TOLD"], "a", buffering=1)
settings = {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "GGML_NO_BACKTRACE")}
print(json.dumps([sys.argv[1:], settings]), file=told)
if "MUTE" in os.environ:
    sys.stdin.read(); import signal; signal.pause()
listening = socket.socket()
listening.bind(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
listening.listen()
while True:
    listening.accept()
    print('"somebody connected"', file=told)
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SOLLOL_RPC_SERVER", "SOLLOL_LLAMA_SERVER"):
        monkeypatch.delenv(variable, raising=False)
    llama_cpp._find.cache_clear()


type Make = Callable[[Sequence[int]], RpcServers]


@pytest.fixture
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes rpc-servers that run real processes, unless the test asks for the stand-in."""
    if "stand_in" not in request.fixturenames and llama_cpp.program("ggml-rpc-server") is None:
        pytest.skip("this system has no ggml-rpc-server")
    made: list[RpcServers] = []

    def make_one(ports: Sequence[int]) -> RpcServers:
        made.append(RpcServers(ports=ports))
        return made[-1]

    yield make_one
    for each in made:
        await each.close()


@pytest.fixture
def servers(make: Make) -> RpcServers:
    return make(free_ports(8))


class StandIn:
    def __init__(self, told: Path) -> None:
        self._told = told

    @property
    def told(self) -> list[object]:
        return [json.loads(line) for line in self._told.read_text().splitlines()]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    program = tmp_path / "ggml-rpc-server"
    program.write_text(f"#!{sys.executable}\n{STAND_IN}")
    program.chmod(0o755)
    monkeypatch.setenv("SOLLOL_RPC_SERVER", str(program))
    monkeypatch.setenv("LISTING", "  CPU: AMD EPYC (24105 MiB, 24105 MiB free)")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    (tmp_path / "told").touch()
    return StandIn(tmp_path / "told")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def only(rpc: Rpc) -> str:
    (server,) = rpc.servers
    return server.state


# Its life


async def test_it_listens_on_loopback_alone(servers: RpcServers) -> None:
    process = await servers.start("CPU", "fleet")
    listening = psutil.Process(process.pid).net_connections("inet")
    assert [(each.status, tuple(each.laddr)) for each in listening] == [
        (psutil.CONN_LISTEN, ("127.0.0.1", process.port))
    ]
    with socket.create_connection(("127.0.0.1", process.port), timeout=20):
        pass
    sample = process.sample()
    assert sample.state == "running"
    assert sample.memory_bytes > 1 << 20
    assert os.getsid(process.pid) == process.pid


async def test_the_report_tells_of_each(servers: RpcServers) -> None:
    first, second = await asyncio.gather(servers.start("CPU", "one"), servers.start("CPU", "two"))
    rpc = servers.snapshot(HOST, [])
    assert rpc.error is None
    assert rpc.build == first.build
    assert {(each.id, each.pid, each.port, each.coordinator, each.state) for each in rpc.servers} == {
        (first.id, first.pid, first.port, "one", "running"),
        (second.id, second.pid, second.port, "two", "running"),
    }
    await first.stop()
    assert [each.id for each in servers.snapshot(HOST, []).servers] == [second.id]
    assert not psutil.pid_exists(first.pid)
    assert psutil.Process(second.pid).is_running()


async def test_one_that_is_killed_is_noticed_at_once(servers: RpcServers) -> None:
    process = await servers.start("CPU", "fleet")
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        assert await process.exited == -signal.SIGKILL
    assert process.sample().state == "exited"
    assert process.sample().memory_bytes == 0
    assert only(servers.snapshot(HOST, [])) == "exited"
    await process.stop()
    assert servers.snapshot(HOST, []).servers == []


async def test_one_that_is_stopped_is_told_and_can_be_ended(servers: RpcServers) -> None:
    process = await servers.start("CPU", "fleet")
    os.kill(process.pid, signal.SIGSTOP)
    await until(lambda: process.sample().state == "stopped")
    assert only(servers.snapshot(HOST, [])) == "stopped"
    os.kill(process.pid, signal.SIGCONT)
    await until(lambda: process.sample().state == "running")
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(20):
        await process.stop()
        await process.stop()
    assert not psutil.pid_exists(process.pid)


async def test_close_ends_them_all(servers: RpcServers) -> None:
    started = [await servers.start("CPU", "fleet") for _ in range(3)]
    await servers.close()
    assert not [process for process in started if psutil.pid_exists(process.pid)]


def test_it_does_not_outlive_its_agent() -> None:
    if sys.platform != "linux" or llama_cpp.program("ggml-rpc-server") is None:
        pytest.skip("only Linux can promise this")
    agent = (
        "import asyncio, sys\n"
        "from agent.rpc_server import RpcServers\n"
        "async def main():\n"
        "    process = await RpcServers(ports=list(map(int, sys.argv[1:]))).start('CPU', 'fleet')\n"
        "    print(process.pid, flush=True)\n"
        "    await process.exited\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", agent, *map(str, free_ports(4))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        child = psutil.Process(int(running.stdout.readline()))
        running.kill()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert alive == []


async def test_nobody_connects_to_it_but_its_client(servers: RpcServers, stand_in: StandIn) -> None:
    process = await servers.start("CPU", "fleet")
    for _ in range(50):
        process.sample()
        servers.snapshot(HOST, [])
    with socket.create_connection(("127.0.0.1", process.port), timeout=20):
        await until(lambda: len(stand_in.told) > 1)
    assert stand_in.told[1:] == ["somebody connected"]  # which shows that it would have told


async def test_a_start_that_is_given_up_leaves_nothing(
    servers: RpcServers, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUTE", "1")
    starting = asyncio.create_task(servers.start("CPU", "fleet"))
    await until(lambda: bool(stand_in.told))
    (server,) = servers.snapshot(HOST, []).servers
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not psutil.pid_exists(server.pid)
    assert servers.snapshot(HOST, []).servers == []


async def test_one_that_never_listens_is_given_up(
    servers: RpcServers, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUTE", "1")
    monkeypatch.setattr(rpc_server, "START_TIMEOUT_S", 0.3)
    with pytest.raises(CannotServe, match=r"^ggml-rpc-server did not listen within 0.3 s on CPU$"):
        await servers.start("CPU", "fleet")
    assert servers.snapshot(HOST, []).servers == []


# Ports


async def test_a_port_in_use_is_passed_over(make: Make) -> None:
    taken, free = free_ports(2)
    servers = make([taken, free])
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        other.listen()
        assert (await servers.start("CPU", "fleet")).port == free
        with pytest.raises(CannotServe, match=f"no port from {taken} to {free} is free"):
            await servers.start("CPU", "fleet")


async def test_a_port_that_is_taken_in_the_last_moment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = free_ports(2)
    servers = make([taken, free])
    looks, really = iter([True]), rpc_server._is_free
    monkeypatch.setattr(rpc_server, "_is_free", lambda port: next(looks, None) or really(port))
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        other.listen()
        assert (await servers.start("CPU", "fleet")).port == free
    assert len(servers.snapshot(HOST, []).servers) == 1


async def test_two_agents_on_one_machine(make: Make) -> None:
    ports = free_ports(12)
    agents = [make(ports), make(ports)]
    started: list[RpcProcess] = await asyncio.gather(
        *(agent.start("CPU", "fleet") for agent in agents for _ in range(3))
    )
    assert len({process.port for process in started}) == 6
    assert {process.sample().state for process in started} == {"running"}


# What it cannot do


async def test_a_device_that_is_not_here(servers: RpcServers) -> None:
    with pytest.raises(CannotServe, match=r"^this node has no device CUDA3; it has CPU$"):
        await servers.start("CUDA3", "fleet")


async def test_another_build(servers: RpcServers) -> None:
    process = await servers.start("CPU", "fleet")
    assert (await servers.start("CPU", "fleet", build=process.build)).build == process.build
    with pytest.raises(CannotServe) as refused:
        await servers.start("CPU", "fleet", build="79c1160b")
    assert process.build in str(refused.value)
    assert "79c1160b" in str(refused.value)
    assert len(servers.snapshot(HOST, []).servers) == 2


async def test_a_machine_without_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llama_cpp, "_WHEEL", "no_such_wheel")
    servers = RpcServers()
    with pytest.raises(CannotServe, match=r"^no ggml-rpc-server was found"):
        await servers.start("CPU", "fleet")
    rpc = servers.snapshot(HOST, [])
    assert (rpc.build, rpc.devices) == (None, [])
    assert (rpc.error or "").startswith("no ggml-rpc-server was found")
    monkeypatch.setenv("SOLLOL_RPC_SERVER", "/nowhere/rpc-server")
    with pytest.raises(CannotServe, match="SOLLOL_RPC_SERVER names /nowhere/rpc-server"):
        await RpcServers().start("CPU", "fleet")


async def test_a_program_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'CUDA error: no driver'\necho bye\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("SOLLOL_RPC_SERVER", str(program))
    servers = RpcServers(ports=free_ports(2))
    with pytest.raises(CannotServe) as refused:
        await servers.start("CPU", "fleet")
    assert str(refused.value) == (
        "ggml-rpc-server cannot run on CPU: it ended with status 3: CUDA error: no driver"
    )
    program.write_text("#!/nowhere/sh\n")
    with pytest.raises(CannotServe, match="broken cannot be started: No such file or directory"):
        await servers.start("CPU", "fleet")


# Devices


def gpu(index: int, name: str, gib: float, **more: object) -> Gpu:
    figures = {
        "vendor": "nvidia",
        "uuid": f"GPU-{index}",
        "memory_total_bytes": int(gib * GIB),
        "memory_free_bytes": int(gib * GIB * 0.75),
        "memory_used_bytes": int(gib * GIB * 0.25),
    }
    return Gpu.model_validate({"index": index, "name": name} | figures | more)


def offered(*names: tuple[str, str, float]) -> Sequence[GgmlDevice]:
    return [GgmlDevice(name, description, int(gib * GIB)) for name, description, gib in names]


RTX, L4 = "NVIDIA GeForce RTX 3090", "NVIDIA L4"
RADEON = "AMD GPU 0x744c"


@pytest.mark.parametrize(
    ("listed", "gpus", "expected"),
    [
        ([("CPU", "AMD EPYC", 32)], [gpu(0, RTX, 24)], {}),
        ([("CUDA0", RTX, 23.6), ("CPU", "x", 32)], [gpu(0, RTX, 24)], {"CUDA0": 0}),
        (
            [("CUDA0", L4, 22), ("CUDA1", RTX, 23.6)],
            [gpu(0, RTX, 24), gpu(1, L4, 22.5)],
            {"CUDA0": 1, "CUDA1": 0},
        ),
        (
            [("CUDA0", RTX, 23.6), ("CUDA1", RTX, 23.6)],
            [gpu(0, RTX, 24), gpu(1, RTX, 24)],
            {"CUDA0": 0, "CUDA1": 1},
        ),
        ([("Vulkan0", RTX, 24), ("CUDA0", RTX, 23.6)], [gpu(0, RTX, 24)], {"CUDA0": 0}),
        (
            [("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24)],
            [gpu(0, RADEON, 24, vendor="amd")],
            {"Vulkan0": 0},
        ),
        ([("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24)], [gpu(0, RADEON, 16, vendor="amd")], {}),
        ([("CUDA0", "GPU", 24)], [gpu(0, RADEON, 24, vendor="amd")], {}),
        ([("MTL0", "Apple M2", 16)], [gpu(0, "Apple M2", 10.6, vendor="apple", uuid=None)], {"MTL0": 0}),
    ],
)
def test_which_gpu_a_device_is(
    listed: list[tuple[str, str, float]], gpus: list[Gpu], expected: dict[str, int]
) -> None:
    assert {name: found.index for name, found in match(offered(*listed), gpus).items()} == expected


def test_devices_have_the_agents_figures() -> None:
    host = HOST.model_copy(update={"memory_bandwidth_bytes_s": 40e9})
    gpus = [gpu(0, RTX, 24, memory_bandwidth_bytes_s=936e9)]
    listed = offered(("CUDA0", RTX, 23.6), ("CPU", "AMD EPYC", 32))
    cuda, cpu = devices(gpus, host, offered=listed)
    assert (cuda.name, cuda.kind, cuda.gpu_index) == ("CUDA0", "gpu", 0)
    assert (cuda.memory_total_bytes, cuda.memory_free_bytes) == (24 * GIB, 18 * GIB)
    assert cuda.memory_bandwidth_bytes_s == 936e9
    assert (cpu.name, cpu.kind, cpu.gpu_index) == ("CPU", "cpu", None)
    assert (cpu.memory_total_bytes, cpu.memory_free_bytes) == (32 * GIB, 20 * GIB)
    assert cpu.memory_bandwidth_bytes_s == 40e9


@pytest.mark.parametrize(
    ("lends", "held", "free"),
    [(None, 0, 20), (None, 5, 20), (30, 0, 20), (8, 0, 8), (8, 5, 3), (8, 9, 0), (0, 0, 0)],
)
def test_no_more_is_lent_than_the_owner_allows(lends: int | None, held: int, free: int) -> None:
    (cpu,) = devices([], HOST, None if lends is None else lends * GIB, held_bytes={"CPU": held * GIB})
    assert cpu.memory_free_bytes == free * GIB


async def test_a_gpu_is_chosen_by_its_uuid(
    servers: RpcServers, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "LISTING", f"  CUDA0: {L4} (22478 MiB, 1 MiB free)\n  CUDA1: {RTX} (24124 MiB, 1 MiB free)"
    )
    gpus = [gpu(0, L4, 22.5), gpu(1, RTX, 24)]
    await servers.look(gpus)
    assert [device.name for device in servers.snapshot(HOST, gpus).devices] == ["CUDA0", "CUDA1", "CPU"]
    process = await servers.start("CUDA1", "fleet", threads=3)
    arguments = ["-d", "CUDA0", "-t", "3", "-H", "127.0.0.1", "-p", str(process.port)]
    assert stand_in.told == [[arguments, {"CUDA_VISIBLE_DEVICES": "GPU-1", "GGML_NO_BACKTRACE": "1"}]]
    before_bytes = process.sample().memory_bytes
    holds = [GpuProcess(pid=process.pid, memory_used_bytes=5 * GIB), GpuProcess(pid=1, memory_used_bytes=GIB)]
    (server,) = servers.snapshot(HOST, [gpus[0], gpus[1].model_copy(update={"processes": holds})]).servers
    assert server.memory_bytes >= 5 * GIB
    assert server.memory_bytes - before_bytes < 6 * GIB


async def test_other_gpus_are_looked_for_when_the_drivers_list_changes(
    servers: RpcServers, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    await servers.look([])
    assert [device.name for device in servers.snapshot(HOST, []).devices] == ["CPU"]
    monkeypatch.setenv("LISTING", f"  CUDA0: {RTX} (24124 MiB, 1 MiB free)")
    await servers.look([])
    llama_cpp._find.cache_clear()  # the environment that it was found with held the old listing
    await servers.look([gpu(0, RTX, 24)])
    assert [device.name for device in servers.snapshot(HOST, [gpu(0, RTX, 24)]).devices] == ["CUDA0", "CPU"]


# In the report and the metrics


async def test_the_sampler_reports_it(servers: RpcServers) -> None:
    servers.lends_bytes, servers.tunnel_port = GIB, 11437
    async with OllamaClient("http://127.0.0.1:9") as client:
        sampler = Sampler(
            node_id="0" * 16,
            ollama=client,
            gpus=NoGpu(),
            host=HostReader(None),
            rpc=servers,
            memory_bandwidth=lambda: 40e9,
        )
        await sampler.first()
        rpc = sampler.report().rpc
        assert rpc is not None
        assert rpc.error == "llama.cpp is still being looked for"
        process = await servers.start("CPU", 'the "fleet"')
        running = asyncio.create_task(sampler.run())
        await until(lambda: sampler.report().host.memory_bandwidth_bytes_s is not None)
        report = sampler.report()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    rpc = report.rpc
    assert rpc is not None
    assert (rpc.build, rpc.tunnel_port, rpc.lends_bytes) == (process.build, 11437, GIB)
    (cpu,) = rpc.devices
    (server,) = rpc.servers
    assert cpu.memory_bandwidth_bytes_s == report.host.memory_bandwidth_bytes_s == 40e9
    assert cpu.memory_free_bytes == GIB - server.memory_bytes
    assert Report.model_validate_json(report.model_dump_json()) == report
    measured = scrape(report)
    labels = {"device": "CPU", "coordinator": 'the "fleet"', "port": str(process.port)}
    assert measured.get_sample_value("sollol_agent_rpc_server_running", labels) == 1
    held_bytes = measured.get_sample_value("sollol_agent_rpc_server_memory_bytes", labels)
    assert held_bytes == server.memory_bytes
    free_bytes = measured.get_sample_value("sollol_agent_rpc_device_memory_free_bytes", {"device": "CPU"})
    assert free_bytes == cpu.memory_free_bytes
    assert measured.get_sample_value("sollol_agent_host_memory_bandwidth_bytes_per_second") == 40e9


async def test_a_server_that_is_gone_is_no_metric(servers: RpcServers) -> None:
    process = await servers.start("CPU", "fleet")
    os.kill(process.pid, signal.SIGSTOP)
    await until(lambda: process.sample().state == "stopped")
    labels = {"device": "CPU", "coordinator": "fleet", "port": str(process.port)}
    name = "sollol_agent_rpc_server_running"
    assert scrape(report_of(servers)).get_sample_value(name, labels) == 0
    os.kill(process.pid, signal.SIGKILL)
    await process.exited
    assert scrape(report_of(servers)).get_sample_value(name, labels) is None


def report_of(servers: RpcServers) -> Report:
    return Report(
        agent_version="0",
        node_id="0" * 16,
        sampled_at=datetime.now(UTC),
        sample_age_s=0,
        host=HOST,
        ollama=Ollama(url="http://127.0.0.1:9", reachable=False),
        rpc=servers.snapshot(HOST, []),
    )


def scrape(report: Report) -> CollectorRegistry:
    class Once(Collector):
        def collect(self) -> Iterable[Metric]:
            return metrics.from_report(report)

    registry = CollectorRegistry()
    registry.register(Once())
    return registry
