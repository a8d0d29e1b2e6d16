"""An agent's tunnel server, as members, strangers and clients that misbehave see it."""

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from agent import join, pki
from agent.json_lines import LONGEST_LINE_BYTES
from tests.agent.tunnels import Client, EchoServers, Members, tunnel_server

LEASE = {"op": "rpc-server", "device": "CPU", "build": "b1", "threads": 2}


async def leased(members: Members, port: int, name: str = "head") -> tuple[Client, dict[str, Any]]:
    client = await Client.connect(port, members.client(name, "coordinator"))
    answer = await client.ask(LEASE)
    assert answer.pop("ok") is True
    return client, answer


async def tunnelled(members: Members, port: int, server_id: str, name: str = "head") -> Client:
    client = await Client.connect(port, members.client(name, "coordinator"))
    assert await client.ask({"op": "tunnel", "id": server_id}) == {"ok": True}
    return client


async def still_serves(members: Members, port: int) -> bool:
    client = await Client.connect(port, members.client())
    answer = await client.ask({"op": "echo"})
    client.close()
    return bool(answer == {"ok": True})


# Who is let in


def _uncertified(members: Members, tmp_path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(pki.fleet_dir(members.directory("agent")) / "ca.pem")
    return context


def _of_another_fleet(members: Members, tmp_path: Path) -> ssl.SSLContext:
    join.init_fleet(tmp_path / "other", "head")
    context = pki.client_context(tmp_path / "other")
    context.load_verify_locations(pki.fleet_dir(members.directory("agent")) / "ca.pem")
    return context


def _of_old(members: Members, tmp_path: Path) -> ssl.SSLContext:
    context = members.client()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


@pytest.mark.parametrize("stranger", [_uncertified, _of_another_fleet, _of_old])
async def test_a_stranger_is_refused_in_the_handshake(
    members: Members, servers: EchoServers, port: int, tmp_path: Path, stranger: Any
) -> None:
    try:
        client = await Client.connect(port, stranger(members, tmp_path))
        client.send(LEASE)  # under TLS 1.3 a client believes itself connected before it was verified
        assert await client.end() == b""
    except (ssl.SSLError, ConnectionError):
        pass
    assert not servers.asked
    assert await still_serves(members, port)


@pytest.mark.parametrize("operation", [LEASE, {"op": "tunnel", "id": "x"}, {"op": "measure"}])
async def test_a_member_that_is_no_coordinator_may_only_help_to_measure(
    members: Members, servers: EchoServers, port: int, operation: Any
) -> None:
    client = await Client.connect(port, members.client("peer", "agent"))
    assert await client.ask({"op": "echo"}) == {"ok": True}
    client.send({"op": "sink", "bytes": 100_000})
    client.writer.write(b"\n" * 100_000)
    assert await client.hear() == {"ok": True}
    assert await client.ask(operation) == {
        "ok": False,
        "error": "only a coordinator may ask for this, and peer is none",
    }
    assert await client.end() == b""
    assert not servers.asked


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"\x00\xff\n", "a line is no JSON"),
        (b"[]\n", "a line is no JSON object"),
        (b"[" * 60_000 + b"\n", "a line is no JSON"),
        (b"{}\n", "this agent knows no such request"),
        (b'{"op": ["echo"]}\n', "this agent knows no such request"),
        (b"x" * (LONGEST_LINE_BYTES + 1), "a line is longer than 65536 bytes"),
        (b"x" * 1_000_000, "a line is longer than 65536 bytes"),
        (b'{"op": "rpc-server", "device": 1}\n', "device is missing or is no str"),
        (b'{"op": "rpc-server", "device": "CPU", "build": "b", "threads": true}\n', "threads is missing or"),
        (b'{"op": "sink", "bytes": -1}\n', "at most 16777216 bytes can be sent to measure"),
        (b'{"op": "sink", "bytes": 99999999999}\n', "at most 16777216 bytes can be sent to measure"),
    ],
)
async def test_garbage_is_answered_by_a_sentence_and_the_end(
    members: Members, servers: EchoServers, port: int, sent: bytes, error: str
) -> None:
    client = await Client.connect(port, members.client())
    client.writer.write(sent)
    answer = await client.hear()
    assert answer["ok"] is False
    assert answer["error"].startswith(error)
    assert await client.end() == b""
    assert not servers.asked
    assert await still_serves(members, port)


async def test_what_is_no_tls_is_hung_up_on(members: Members, port: int) -> None:
    client = await Client.connect(port, None)
    client.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP" not in await client.end()
    assert await still_serves(members, port)


async def test_who_says_nothing_or_too_slowly_is_hung_up_on(members: Members, servers: EchoServers) -> None:
    async with tunnel_server(members, servers, request_s=0.3) as port:
        silent = await Client.connect(port, None)  # before the handshake
        mute = await Client.connect(port, members.client())
        slow = await Client.connect(port, members.client())

        async def dribble() -> None:
            while not slow.writer.is_closing():
                slow.writer.write(b" ")
                await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        async with asyncio.timeout(20):
            assert await silent.end() == b""
            assert await mute.end() == b""
            assert await slow.end() == b""
        slow.close()
        await dribbling
        assert await still_serves(members, port)


async def test_connections_are_bounded(members: Members, servers: EchoServers) -> None:
    async with tunnel_server(members, servers, most_connections=2, request_s=60) as port:
        held = [await Client.connect(port, members.client()) for _ in range(2)]
        for client in held:
            assert await client.ask({"op": "echo"}) == {"ok": True}
        one_more = await Client.connect(port, members.client())
        assert await one_more.hear() == {"ok": False, "error": "there are too many connections"}
        assert await one_more.end() == b""
        one_more.close()
        for client in held:  # those who are in are not disturbed
            assert await client.ask({"op": "echo"}) == {"ok": True}
            client.close()
        while (await try_echo(members, port)) != {"ok": True}:
            await asyncio.sleep(0)


async def try_echo(members: Members, port: int) -> Any:
    client = await Client.connect(port, members.client())
    try:
        return await client.ask({"op": "echo"})
    except ConnectionError:
        return None
    finally:
        client.close()


async def test_who_only_connects_however_often_keeps_no_member_out(
    members: Members, servers: EchoServers
) -> None:
    async with tunnel_server(members, servers, most_handshakes=4, request_s=60) as port:
        inside = await Client.connect(port, members.client())
        idle = [await Client.connect(port, None) for _ in range(12)]
        assert await still_serves(members, port)
        # The oldest gave way, and only they.
        assert [await client.end() for client in idle[:8]] == [b""] * 8
        assert await inside.ask({"op": "echo"}) == {"ok": True}
        for client in (inside, *idle):
            client.close()


# Leases


async def test_a_lease_tells_how_the_process_does_and_kills_it_at_its_end(
    members: Members, servers: EchoServers, port: int
) -> None:
    client, answer = await leased(members, port)
    (process,) = servers.started
    assert servers.asked == [("CPU", "head", 2, "b1")]
    assert answer == {"id": process.id, "build": "b1", "port": process.port, "local_pid": process.pid}
    status = {"state": "running", "cpu_s": 0.5, "memory_bytes": 1000, "received_bytes": 0}
    assert [await client.hear() for _ in range(2)] == [status, status]
    assert not process.killed
    client.close()
    await process.exited
    assert process.killed


async def test_what_a_lease_cannot_have_is_a_sentence_and_requests_may_follow(
    members: Members, port: int
) -> None:
    client = await Client.connect(port, members.client())
    answer = await client.ask(LEASE | {"device": "broken"})
    assert answer == {"ok": False, "error": "this node has no device broken; it has CPU"}
    assert (await client.ask(LEASE))["ok"]
    client.close()


async def test_the_end_of_the_process_is_told_at_once(
    members: Members, servers: EchoServers, port: int
) -> None:
    client, _ = await leased(members, port)
    await client.hear()
    servers.started[0].exit(3)
    told = await client.hear()
    assert (told["state"], told["reason"]) == ("exited", "it ended with status 3")
    assert await client.end() == b""


async def test_a_coordinator_that_falls_silent_loses_its_server(
    members: Members, servers: EchoServers
) -> None:
    async with tunnel_server(members, servers, ping_s=0.3) as port:
        client, answer = await leased(members, port)
        tunnel = await tunnelled(members, port, answer["id"])
        await servers.started[0].exited
        assert servers.started[0].killed
        assert await tunnel.end() == b""
        assert b"running" in await client.end()


async def test_a_lease_lives_as_long_as_it_pings(members: Members, servers: EchoServers) -> None:
    async with tunnel_server(members, servers, ping_s=2.5) as port:
        client, _ = await leased(members, port)
        for _ in range(4):  # a second apart
            await client.hear()
            client.send({"op": "ping"})
        assert not servers.started[0].killed
        client.send({"op": "end"})
        await servers.started[0].exited


async def test_the_end_of_the_agent_ends_everything(members: Members, servers: EchoServers) -> None:
    async with tunnel_server(members, servers) as port:
        client, answer = await leased(members, port)
        tunnel = await tunnelled(members, port, answer["id"])
    assert servers.started[0].killed
    assert await tunnel.end() == b""
    assert b"running" in await client.end()


# Tunnels


async def test_a_tunnel_carries_bytes_both_ways_and_counts_them(
    members: Members, servers: EchoServers, port: int
) -> None:
    client, answer = await leased(members, port)
    tunnel = await tunnelled(members, port, answer["id"])
    sent = bytes(range(256)) * 16384 + b"\n{}\n"

    async def send() -> None:
        tunnel.writer.write(sent)
        await tunnel.writer.drain()

    sending = asyncio.create_task(send())
    assert await tunnel.reader.readexactly(len(sent)) == sent
    await sending
    while (await client.hear())["received_bytes"] != len(sent):
        pass
    tunnel.close()
    client.close()


async def test_bytes_sent_with_the_request_are_not_lost(
    members: Members, servers: EchoServers, port: int
) -> None:
    client, answer = await leased(members, port)
    tunnel = await Client.connect(port, members.client())
    tunnel.writer.write(b'{"op": "tunnel", "id": "%s"}\n' % answer["id"].encode() + b"hello")
    assert await tunnel.hear() == {"ok": True}
    assert await tunnel.reader.readexactly(5) == b"hello"
    client.close()


async def test_a_tunnel_holds_back_who_sends_more_than_is_read(
    members: Members, servers: EchoServers, port: int
) -> None:
    _, answer = await leased(members, port)
    servers.started[0].reads = False
    tunnel = await tunnelled(members, port, answer["id"])
    sent_bytes = 0
    chunk = bytes(1 << 20)
    with pytest.raises(TimeoutError):
        while True:
            tunnel.writer.write(chunk)
            sent_bytes += len(chunk)
            assert sent_bytes < 256 << 20
            async with asyncio.timeout(1):
                await tunnel.writer.drain()
    tunnel.close()


async def test_the_end_of_either_side_is_the_end_of_the_other(
    members: Members, servers: EchoServers, port: int
) -> None:
    _, answer = await leased(members, port)
    one = await tunnelled(members, port, answer["id"])
    one.writer.write(b"x")
    assert await one.reader.readexactly(1) == b"x"
    servers.started[0].clients[0].close()
    assert await one.end() == b""
    two = await tunnelled(members, port, answer["id"])
    two.writer.write(b"x")
    assert await two.reader.readexactly(1) == b"x"
    two.close()
    await servers.started[0].clients[1].wait_closed()


async def test_a_reset_is_a_reset(members: Members, servers: EchoServers, port: int) -> None:
    client, answer = await leased(members, port)
    tunnel = await tunnelled(members, port, answer["id"])
    client.send({"op": "reset"})
    with pytest.raises(ConnectionResetError):
        await tunnel.reader.read()
    assert not servers.started[0].killed
    again = await tunnelled(members, port, answer["id"])
    again.writer.write(b"x")
    assert await again.reader.readexactly(1) == b"x"


async def test_a_tunnel_leads_to_ones_own_servers_alone(
    members: Members, servers: EchoServers, port: int
) -> None:
    _, answer = await leased(members, port)
    other = await Client.connect(port, members.client("second", "coordinator"))
    for asked in (answer["id"], "none"):
        refused = await other.ask({"op": "tunnel", "id": asked})
        assert refused == {"ok": False, "error": "there is no such rpc-server"}
    assert not servers.started[0].clients


async def test_a_name_that_another_coordinator_bears_too_opens_nothing(
    members: Members, servers: EchoServers, port: int, tmp_path: Path
) -> None:
    _, answer = await leased(members, port)
    key, csr = pki.new_request("head", "f" * 16)
    founder = members.directory("head")
    pki.save_identity(tmp_path, pki.authority(founder), pki.issue(founder, csr, "coordinator"), key)
    other = await Client.connect(port, pki.client_context(tmp_path))
    assert not (await other.ask({"op": "tunnel", "id": answer["id"]}))["ok"]


async def test_nothing_is_delayed_to_be_sent_with_more(members: Members, port: int) -> None:
    _, answer = await leased(members, port)
    tunnel = await tunnelled(members, port, answer["id"])
    connection = tunnel.writer.get_extra_info("socket")
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
