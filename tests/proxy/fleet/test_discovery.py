"""Where nodes come from. The resolver and the mDNS browser are given; everything else is real."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent.announce import Announced
from proxy_addon.ask import Ask
from proxy_addon.endpoints import ENDPOINTS
from proxy_addon.fleet import discovery
from proxy_addon.fleet.addresses import local_addresses
from proxy_addon.fleet.discovery import Discovery, OnChange, announced_node, origins
from proxy_addon.fleet.node import Fleet
from proxy_addon.settings import Settings
from tests.proxy.fleet.conftest import until


def tree(**settings: Any) -> Settings:
    return Settings.model_validate({"discovery": {"mdns": False}, "listen": "127.0.0.1:11500", **settings})


class House:
    """A discovery with names and announcements of its own."""

    def __init__(self, names: dict[str, list[str]] | None = None, env: str = "", **settings: Any) -> None:
        self.names = names or {}
        self.fleet = Fleet()
        self.on_change: OnChange
        self.browsing = 0
        environ = {"OLLAMA_HOST": env}
        self.discovery = Discovery(self.fleet, tree(**settings), environ, self.resolve, self.browse)

    async def resolve(self, host: str) -> list[str]:
        try:
            return self.names[host]
        except KeyError:
            raise OSError(-2, "Name or service not known") from None

    @asynccontextmanager
    async def browse(self, on_change: OnChange) -> AsyncIterator[None]:
        self.on_change = on_change
        self.browsing += 1
        yield
        self.browsing -= 1

    async def __aenter__(self) -> House:
        await self.discovery.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.discovery.stop()
        assert self.browsing == 0

    @property
    def nodes(self) -> list[str]:
        return sorted(self.fleet.nodes)


def announced(**changes: Any) -> Announced:
    fields = {
        "node_id": "n1",
        "kind": "ollama",
        "addresses": ("192.0.2.7",),
        "agent_port": 11435,
        "ollama_port": 11434,
        "version": "1",
    }
    return Announced(**{**fields, **changes})


MDNS = {"discovery": {"mdns": True, "localhost": False, "dns_refresh_s": 3600}}


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ({}, "", [("127.0.0.1:11434", "local")]),
        ({}, "gpu1", [("gpu1:11434", "OLLAMA_HOST")]),
        ({"nodes": "a,b:80"}, "", [("a:11434", "config"), ("b:80", "config")]),
        ({"nodes": "a"}, "gpu1", [("a:11434", "config"), ("gpu1:11434", "OLLAMA_HOST")]),
        ({"discovery": {"ollama_host": False}}, "gpu1", [("127.0.0.1:11434", "local")]),
        ({"discovery": {"localhost": False}}, "", []),
        ({}, "https://gpu1", [("127.0.0.1:11434", "local")]),
        # clients are told by OLLAMA_HOST where the proxy is
        ({}, "127.0.0.1:11500", [("127.0.0.1:11434", "local")]),
        ({"listen": "0.0.0.0:11500"}, "http://127.0.0.1:11500", [("127.0.0.1:11434", "local")]),
        ({"listen": "127.0.0.1:11434"}, "127.0.0.1:11434", []),
        ({"listen": "127.0.0.1:11434"}, "", []),
    ],
)
def test_who_is_named(settings: dict[str, Any], environment: str, expected: list[tuple[str, str]]) -> None:
    found, _ = origins(tree(**settings), {"OLLAMA_HOST": environment})
    assert [(str(origin.named), origin.source) for origin in found] == expected


@pytest.mark.parametrize(
    ("settings", "environment", "notes"),
    [
        ({}, "gpu1", []),
        ({}, "127.0.0.1:11500", []),
        ({}, "https://gpu1", ["OLLAMA_HOST=https://gpu1 is not used: a node must speak plain HTTP."]),
        (
            {"listen": "0.0.0.0:11434"},
            "",
            [
                "SOLLOL listens on 0.0.0.0:11434 itself, so this machine's Ollama must listen elsewhere to be"
                " used: name it with --nodes."
            ],
        ),
    ],
)
def test_what_is_said_of_it(settings: dict[str, Any], environment: str, notes: list[str]) -> None:
    assert origins(tree(**settings), {"OLLAMA_HOST": environment})[1] == notes


async def test_a_node_has_what_its_settings_say() -> None:
    entry = {
        "host": "gpu1",
        "port": 80,
        "kind": "shard",
        "agent": "gpu1:99",
        "parallel": 4,
        "priority": 9,
        "preferred_tasks": "embed",
    }
    async with House({"gpu1": ["10.0.0.1"]}, nodes=[entry]) as house:
        (node,) = house.fleet
    assert (node.name, node.kind, node.agent_url, node.source) == (
        "gpu1:80",
        "shard",
        "http://gpu1:99",
        "config",
    )
    assert (node.parallel, node.priority, node.preferred_tasks) == (4, 9, frozenset({"embed"}))


@pytest.mark.parametrize(
    ("addresses", "nodes"),
    [
        (["10.0.0.1"], ["ollama:11434"]),
        (["10.0.0.1", "10.0.0.1"], ["ollama:11434"]),
        (["10.0.0.2", "10.0.0.1"], ["10.0.0.1:11434", "10.0.0.2:11434"]),
        (["10.0.0.1", "fd00::1"], ["ollama:11434"]),  # one machine, both families
        (["fd00::1", "10.0.0.2", "10.0.0.1", "fd00::2"], ["10.0.0.1:11434", "10.0.0.2:11434"]),
        (["fd00::1", "fd00::2"], ["[fd00::1]:11434", "[fd00::2]:11434"]),
    ],
)
async def test_a_name_with_many_addresses_is_many_nodes(addresses: list[str], nodes: list[str]) -> None:
    async with House({"ollama": addresses}, nodes="ollama") as house:
        assert house.nodes == nodes


async def test_each_address_has_its_own_agent() -> None:
    entries = [{"host": "ollama", "agent": "http://ollama:99"}, {"host": "other", "agent": "http://one:99"}]
    names = {"ollama": ["10.0.0.1", "10.0.0.2"], "other": ["10.0.1.1", "10.0.1.2"]}
    async with House(names, nodes=entries) as house:
        agents = {node.name: (node.agent_url, node.source) for node in house.fleet}
    assert agents == {
        "10.0.0.1:11434": ("http://10.0.0.1:99", "dns"),
        "10.0.0.2:11434": ("http://10.0.0.2:99", "dns"),
        "10.0.1.1:11434": (None, "dns"),
        "10.0.1.2:11434": (None, "dns"),
    }


async def test_addresses_come_and_go_without_losing_work() -> None:
    async with House({"ollama": ["10.0.0.1", "10.0.0.2"]}, nodes="ollama,10.0.0.9") as house:
        leaving = house.fleet.find("10.0.0.1", 11434)
        assert leaving is not None
        leaving.polled_s = 0.0
        flight = leaving.take(Ask(ENDPOINTS[0]), 0, 1)
        house.names["ollama"] = ["10.0.0.2", "10.0.0.3"]
        await house.discovery.refresh()
        assert house.nodes == ["10.0.0.1:11434", "10.0.0.2:11434", "10.0.0.3:11434", "10.0.0.9:11434"]
        assert not leaving.up(0), "no new work for a node that leaves"
        flight.drop()
        await house.discovery.refresh()
        assert house.nodes == ["10.0.0.2:11434", "10.0.0.3:11434", "10.0.0.9:11434"]


async def test_a_node_that_is_named_again_stays() -> None:
    async with House({"ollama": ["10.0.0.1", "10.0.0.2"]}, nodes="ollama") as house:
        node = house.fleet.find("10.0.0.1", 11434)
        assert node is not None
        node.polled_s = 0.0
        node.take(Ask(ENDPOINTS[0]), 0, 1)
        house.names["ollama"] = ["10.0.0.2", "10.0.0.3"]
        await house.discovery.refresh()
        house.names["ollama"] = ["10.0.0.1", "10.0.0.2"]
        await house.discovery.refresh()
        assert house.fleet.find("10.0.0.1", 11434) is node
        assert node.up(0)


async def test_a_resolver_that_fails_keeps_the_fleet(caplog: pytest.LogCaptureFixture) -> None:
    async with House({"ollama": ["10.0.0.1", "10.0.0.2"]}, nodes="ollama,later") as house:
        assert house.nodes == ["10.0.0.1:11434", "10.0.0.2:11434", "later:11434"]
        del house.names["ollama"]
        await house.discovery.refresh()
        await house.discovery.refresh()
        assert len(house.nodes) == 3
        house.names["later"] = ["10.0.1.1", "10.0.1.2"]
        await house.discovery.refresh()
        assert house.nodes == ["10.0.0.1:11434", "10.0.0.2:11434", "10.0.1.1:11434", "10.0.1.2:11434"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{name} cannot be resolved (Name or service not known); its last addresses are kept."
        for name in ("later", "ollama")
    ]


async def test_names_are_resolved_again_and_again() -> None:
    settings = {"mdns": False, "dns_refresh_s": 0.01}
    async with House({"ollama": ["10.0.0.1"]}, nodes="ollama", discovery=settings) as house:
        house.names["ollama"] = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: house.nodes == ["10.0.0.1:11434", "10.0.0.2:11434"])


async def test_a_name_is_resolved_for_real() -> None:
    assert "127.0.0.1" in await discovery.resolve("localhost")
    with pytest.raises(OSError):
        await discovery.resolve("no-such-host.invalid")


@pytest.mark.parametrize(
    ("listen", "nodes"),
    [
        ("127.0.0.1:11434", "127.0.0.1"),
        ("127.0.0.1:11434", "localhost"),
        ("127.0.0.1:11434", "me"),
        ("127.0.0.1:11434", "both"),
        ("0.0.0.0:11434", "127.0.0.1"),
        ("0.0.0.0:11434", "0.0.0.0"),
    ],
)
async def test_the_proxy_is_never_its_own_node(
    listen: str, nodes: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"me": ["127.0.0.1"], "both": ["127.0.0.1", "192.0.2.1"]}
    async with House(names, listen=listen, nodes=f"{nodes},10.0.0.1") as house:
        assert house.nodes == ["10.0.0.1:11434"] + ["192.0.2.1:11434"] * (nodes == "both")
        await house.discovery.refresh()
    (sentence,) = [record.getMessage() for record in caplog.records]
    assert "SOLLOL itself listens there" in sentence


async def test_an_announced_node_joins_and_leaves() -> None:
    async with House(**MDNS) as house:
        house.on_change("n1", announced())
        (node,) = house.fleet
        assert (node.name, node.agent_url, node.source) == (
            "192.0.2.7:11434",
            "http://192.0.2.7:11435",
            "mdns",
        )
        await house.discovery.refresh()
        assert house.nodes == ["192.0.2.7:11434"]
        house.on_change("n1", announced(agent_port=99))
        assert node.agent_url == "http://192.0.2.7:99"
        house.on_change("n1", announced(addresses=("192.0.2.8",)))
        assert house.nodes == ["192.0.2.8:11434"]
        house.on_change("unknown", None)
        house.on_change("n1", None)
        assert house.nodes == []


async def test_an_announced_node_that_works_leaves_later() -> None:
    async with House(**MDNS) as house:
        house.on_change("n1", announced())
        (node,) = house.fleet
        flight = node.take(Ask(ENDPOINTS[0]), 0, 1)
        house.on_change("n1", None)
        assert house.nodes == [node.name]
        assert node.leaving
        house.on_change("n1", announced())
        assert not node.leaving, "its agent was only restarted"
        house.on_change("n1", None)
        flight.drop()
        await house.discovery.refresh()
        assert house.nodes == []


async def test_an_announcement_of_a_named_node_brings_its_agent_only() -> None:
    names = {"gpu1": ["192.0.2.7"]}
    async with House(names, nodes=["gpu1", {"host": "192.0.2.9", "agent": "x:1"}], **MDNS) as house:
        house.on_change("n1", announced(addresses=("fe80::1%eth0", "192.0.2.7")))
        house.on_change("n2", announced(node_id="n2", addresses=("192.0.2.9",)))
        assert {node.name: node.agent_url for node in house.fleet} == {
            "gpu1:11434": "http://192.0.2.7:11435",
            "192.0.2.9:11434": "http://x:1",
        }
        house.on_change("n1", None)
        assert house.nodes == ["192.0.2.9:11434", "gpu1:11434"]


async def test_this_machine_announces_itself_to_itself() -> None:
    own = tuple(sorted(local_addresses() - {"127.0.0.1", "::1"})) or ("127.0.0.1",)
    async with House(nodes="127.0.0.1", **MDNS) as house:
        house.on_change("n1", announced(addresses=own))
        assert house.nodes == ["127.0.0.1:11434"], "the same Ollama under another address"
    async with House(listen="0.0.0.0:11434", **MDNS) as house:
        house.on_change("n1", announced(addresses=own))
        assert house.nodes == [], "it is the proxy"


async def test_no_multicast_is_no_reason_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    @asynccontextmanager
    async def browse(on_change: OnChange) -> AsyncIterator[None]:
        raise OSError(19, "No such device")
        yield

    fleet = Fleet()
    found = Discovery(fleet, tree(nodes="10.0.0.1", **MDNS), {}, browse=browse)
    await found.start()
    await found.stop()
    assert [node.name for node in fleet] == ["10.0.0.1:11434"]
    assert [r.getMessage() for r in caplog.records] == ["Nodes are not looked for by mDNS: No such device."]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "192.0.2.7:11434"),
        ({"addresses": ("fd00::7", "192.0.2.7")}, "192.0.2.7:11434"),
        ({"addresses": ("fe80::7%2", "fd00::7")}, "[fd00::7]:11434"),
        ({"addresses": ("169.254.1.1", "192.0.2.7")}, "192.0.2.7:11434"),
        ({"addresses": ("fe80::7%2",)}, None),
        ({"ollama_port": None}, None),
        ({"kind": "shard", "ollama_port": 11436}, "192.0.2.7:11436"),
        ({"kind": "something new"}, None),
    ],
)
def test_announcements(changes: dict[str, Any], expected: str | None) -> None:
    node = announced_node(announced(**changes))
    assert (node.name if node else None) == expected
    if node is not None:
        assert node.kind == changes.get("kind", "ollama")


async def test_nodes_that_others_have_added_are_left_alone() -> None:
    async with House(nodes="10.0.0.1") as house:
        house.fleet.add(discovery.Node("10.0.0.2", 11434))
        await house.discovery.refresh()
        assert house.nodes == ["10.0.0.1:11434", "10.0.0.2:11434"]
