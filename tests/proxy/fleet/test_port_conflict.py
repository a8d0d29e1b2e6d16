"""Who holds the port, told in one sentence, over real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxy_addon.fleet import port_conflict as module
from proxy_addon.fleet.port_conflict import port_conflict
from tests.fakes.faults import garbage, hang
from tests.fakes.fixtures import NodeFactory
from tests.proxy.running import RunningProxy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_free_port_is_no_conflict_and_stays_free() -> None:
    port = free_port()
    assert port_conflict("127.0.0.1", port) is None
    assert port_conflict("0.0.0.0", port) is None
    assert port_conflict("localhost", port) is None
    assert port_conflict("", port) is None
    assert port_conflict("127.0.0.1", 0) is None


@pytest.mark.parametrize("listen_host", ["127.0.0.1", "0.0.0.0", "localhost"])
async def test_ollama_holds_it(ollama_node: NodeFactory, listen_host: str) -> None:
    fake = await ollama_node()
    sentence = await asyncio.to_thread(port_conflict, listen_host, fake.server.port)
    assert sentence == (
        f"cannot listen on {listen_host}:{fake.server.port}: Ollama holds the port; either listen elsewhere"
        " (sollol proxy --listen 127.0.0.1:11500), or move Ollama (start it with OLLAMA_HOST=127.0.0.1:11433)"
        " and name it (sollol proxy --nodes 127.0.0.1:11433)"
    )


async def test_another_sollol_holds_it(ollama_node: NodeFactory) -> None:
    async with RunningProxy([await ollama_node()]) as proxy:
        sentence = await asyncio.to_thread(port_conflict, "127.0.0.1", proxy.port)
    assert sentence is not None
    assert "another SOLLOL holds the port" in sentence


@pytest.mark.parametrize("fault", [garbage(), hang()])
async def test_somebody_else_holds_it(
    ollama_node: NodeFactory, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.2)
    fake = await ollama_node()
    fake.fail(fault)  # type: ignore[arg-type]
    sentence = await asyncio.to_thread(port_conflict, "127.0.0.1", fake.server.port)
    assert sentence is not None
    assert "another program holds the port; listen elsewhere" in sentence


@pytest.mark.parametrize("port", [module.ELSEWHERE_PORT, module.MOVED_OLLAMA_PORT])
def test_the_advice_names_no_port_that_is_taken(port: int) -> None:
    assert f":{port})" not in module._held("127.0.0.1", port)


def test_an_address_that_is_not_ours() -> None:
    assert port_conflict("192.0.2.1", free_port()) is not None
    sentence = port_conflict("no-such-host.invalid", 11434)
    assert sentence is not None
    assert "no-such-host.invalid is no address of this machine" in sentence
