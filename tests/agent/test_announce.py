"""mDNS between a real announcer and a real browser, on loopback."""

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from agent.announce import Announced, announceable, announced, browse, read_announcement

LOOPBACK = ["127.0.0.1"]


async def test_a_node_is_found_and_its_leaving_is_told() -> None:
    heard: asyncio.Queue[tuple[str, Announced | None]] = asyncio.Queue()
    async with browse(lambda node_id, node: heard.put_nowait((node_id, node)), interfaces=LOOPBACK):
        async with announced(
            node_id="abad1dea00000001",
            kind="shard",
            addresses=["192.0.2.7", "2001:db8::7"],
            agent_port=11435,
            ollama_port=11436,
            interfaces=LOOPBACK,
        ):
            async with asyncio.timeout(30):
                node_id, node = await heard.get()
            assert node_id == "abad1dea00000001"
            assert node is not None
            assert (node.kind, node.agent_port, node.ollama_port, node.version) == (
                "shard",
                11435,
                11436,
                "0.1.0",
            )
            assert set(node.addresses) == {"192.0.2.7", "2001:db8::7"}
        async with asyncio.timeout(30):
            while (told := await heard.get())[1] is not None:
                assert told[0] == node_id
        assert told == (node_id, None)


def record(
    properties: dict[bytes, bytes | None], port: int = 1, addresses: tuple[str, ...] = ("192.0.2.1",)
) -> Any:
    return SimpleNamespace(properties=properties, port=port, parsed_scoped_addresses=lambda: addresses)


def test_a_sparse_announcement_is_read() -> None:
    assert read_announcement(record({b"node": b"n", b"ollama": b"many", b"x": None})) == Announced(
        "n", "ollama", ("192.0.2.1",), 1, None, ""
    )


@pytest.mark.parametrize(
    "found",
    [
        record({}),
        record({b"node": None}),
        record({b"node": b"n"}, port=0),
        record({b"node": b"n"}, addresses=()),
    ],
)
def test_an_announcement_of_something_else_is_none(found: Any) -> None:
    assert read_announcement(found) is None


def test_loopback_alone_is_not_announced() -> None:
    assert announceable(["127.0.0.1", "::1"]) == []


def test_addresses_to_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["127.0.0.1", "192.0.2.5", "::1", "fe80::1%eth0", "fe80::2", "2001:db8::5", "02:00:00:00:00:01"]
    interfaces = {"eth0": [SimpleNamespace(family=socket.AF_INET, address=each) for each in own]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert announceable(["0.0.0.0"]) == ["192.0.2.5"]
    assert announceable(["::"]) == ["2001:db8::5"]
    assert announceable(["192.0.2.9", "127.0.0.1", "no address"]) == ["192.0.2.9"]
