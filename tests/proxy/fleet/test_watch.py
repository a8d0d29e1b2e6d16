"""The polls of a fleet over real sockets: up, lost, back, and what a node has and holds."""

from __future__ import annotations

import asyncio
import logging

import pytest

from agent.ollama.client import parse_tags
from agent.report import Model
from proxy_addon.fleet import node_watch, shapes
from proxy_addon.fleet.node import Fleet, Node
from tests.fakes.faults import hang, reply, rst
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeModel, FakeOllama
from tests.proxy.fleet.conftest import WatchFactory, until

LLAMA = "registry.ollama.ai/library/llama3.2:latest"


def only(fleet: Fleet) -> Node:
    (node,) = fleet
    return node


def up(node: Node) -> bool:
    return node.up(asyncio.get_running_loop().time())


async def rounds(fake: FakeOllama, n: int = 2, path: str = "/api/ps") -> None:
    """Return after ``n`` more polls of ``path``: what the first brought is known when the last begins."""
    await fake.wait_received(len(fake.requests(path)) + n, path)


async def test_a_node_is_up_with_version_and_models(ollama_node: NodeFactory, watched: WatchFactory) -> None:
    fake = await ollama_node([FakeModel("Llama3.2"), FakeModel("me/gemma3:270m")], version="0.34.1")
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    assert up(node)
    assert node.version == "0.34.1"
    assert node.models.keys() == {LLAMA, "registry.ollama.ai/me/gemma3:270m"}
    assert node.models[LLAMA].digest == FakeModel("Llama3.2").digest
    assert node.poll_latency_s is not None
    assert found.lost == []


async def test_a_node_that_refuses_is_lost_at_once_and_comes_back(
    ollama_node: NodeFactory, watched: WatchFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "proxy_addon")
    fake = await ollama_node()
    found = watched(fake, poll={"failures_to_lose": 1000})
    await found.watch.looked()
    node = only(found.fleet)

    await fake.kill()
    await until(lambda: found.lost)
    assert found.lost == [(node.name, "it refused the connection")]
    assert node.poll_error == "it refused the connection"
    assert not up(node)

    fake.store.add(FakeModel("new"))
    await fake.restart()
    await until(lambda: up(node) and "registry.ollama.ai/library/new:latest" in node.models)
    assert node.poll_error is None
    assert node.health.allowance == 1  # it comes back gradually
    await rounds(fake, 3)

    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        f"{node.name} is up: Ollama 0.33.0.",
        f"{node.name} is lost: it refused the connection.",
    ]
    assert said[2].startswith(f"{node.name} is back after ")
    assert len(said) == 3


async def test_it_is_news_that_a_node_can_be_used_again(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    """Who waits in line is waiting for nothing else."""
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    await fake.kill()
    await until(lambda: found.lost)
    usable: list[bool] = []
    found.fleet.on_news.append(lambda _: usable.append(up(node)))
    for path in ("/api/ps", "/api/tags"):  # what these tell would be news by itself
        fake.fail(hang("before_head", path=path, times=None))
    await fake.restart()
    await until(lambda: up(node))
    assert usable[-1]


@pytest.mark.parametrize("how", ["freeze", "black_hole"])
async def test_a_hung_node_is_lost_after_two_timeouts(
    ollama_node: NodeFactory, watched: WatchFactory, how: str
) -> None:
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    if how == "black_hole":
        for connection in list(fake.server.connections):
            connection.reset()
    getattr(fake, how)()
    await until(lambda: found.lost)
    assert found.lost == [(node.name, "it did not answer /api/version within 0.4 s")]
    fake.heal()
    await until(lambda: up(node))


async def test_a_stalled_ps_keeps_the_node_up(
    ollama_node: NodeFactory, watched: WatchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_watch, "PS_PATIENCE_S", 0.01)
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    fake.fail(hang(path="/api/ps", times=None))
    await rounds(fake, 1)
    await rounds(fake, 5, "/api/version")
    assert up(node)
    assert found.lost == []
    hanging = fake.requests("/api/ps")[-1]
    assert hanging.finished_s is None, "the poll that stalls is neither repeated nor given up early"
    assert [r for r in fake.requests("/api/ps") if r.finished_s is None] == [hanging]


async def test_a_ps_that_is_no_answer_is_said_once_and_keeps_what_was_known(
    ollama_node: NodeFactory, watched: WatchFactory, caplog: pytest.LogCaptureFixture
) -> None:
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    fake.fail(
        reply(500, "broken", path="/api/ps", times=None), reply(500, "broken", path="/api/tags", times=None)
    )
    await rounds(fake, 3)
    await rounds(fake, 2, "/api/tags")
    node = only(found.fleet)
    assert up(node)
    assert LLAMA in node.models
    assert [r.getMessage() for r in caplog.records] == [
        f"The last good /api/ps of {node.name} is kept: it answered /api/ps with status 500.",
        f"The last good /api/tags of {node.name} is kept: it answered /api/tags with status 500.",
    ]
    fake.heal()
    fake.store.add(FakeModel("new"))
    await until(lambda: "registry.ollama.ai/library/new:latest" in node.models)


async def test_resident_models_follow_ps(ollama_node: NodeFactory, watched: WatchFactory) -> None:
    fake = await ollama_node(time_scale=0.001)
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    assert node.resident == {}
    async with found.watch.http().post(f"{fake.url}/api/generate", json={"model": "llama3.2"}) as answer:
        assert answer.status == 200
    await until(lambda: node.resident)
    assert node.resident[LLAMA].size_vram == node.resident[LLAMA].size > 0
    async with found.watch.http().post(
        f"{fake.url}/api/generate", json={"model": "llama3.2", "keep_alive": 0}
    ) as answer:
        assert answer.status == 200
    await until(lambda: not node.resident)


async def test_refresh_learns_of_a_pulled_model_at_once(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake, other = await ollama_node(), await ollama_node()
    found = watched(fake, other, poll={"interval_s": 3600})
    await found.watch.looked()
    fake.store.add(FakeModel("new"))
    other.store.add(FakeModel("new"))
    node = found.fleet.find("127.0.0.1", fake.server.port)
    assert node is not None
    await found.watch.refresh([node])
    assert "registry.ollama.ai/library/new:latest" in node.models
    assert len(other.requests("/api/tags")) == 1, "only the nodes that were named are asked"


async def test_refresh_of_a_node_that_fails_keeps_what_was_known(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    found = watched(fake, poll={"interval_s": 3600})
    await found.watch.looked()
    fake.fail(rst(path="/api/tags", times=None))
    node = only(found.fleet)
    await found.watch.refresh([node, Node("127.0.0.1", 1)])
    assert LLAMA in node.models


async def test_a_model_that_a_request_found_missing_returns_with_the_next_list(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    found = watched(fake, poll={"interval_s": 3600})
    await found.watch.looked()
    node = only(found.fleet)
    node.models.pop(LLAMA)
    await found.watch.refresh([node])
    assert LLAMA in node.models


async def test_suspicion_reads_the_models_anew_at_once(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    found = watched(fake, poll={"interval_s": 3600})
    await found.watch.looked()
    node = only(found.fleet)
    fake.store.remove("llama3.2")
    found.watch.suspect(node)
    await until(lambda: LLAMA not in node.models)


async def test_suspicion_polls_at_once(ollama_node: NodeFactory, watched: WatchFactory) -> None:
    fake = await ollama_node()
    found = watched(fake, poll={"interval_s": 3600})
    await found.watch.looked()
    node = only(found.fleet)
    await fake.kill()
    found.watch.suspect(node)
    found.watch.suspect(Node("127.0.0.1", 1))  # nobody watches it: nothing happens
    await until(lambda: found.lost)


async def test_nodes_that_come_later_are_watched_and_those_that_go_are_not(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    found = watched()
    await found.watch.looked()
    node = found.fleet.add(Node("127.0.0.1", fake.server.port))
    await until(lambda: up(node))
    found.fleet.remove(node)
    found.watch.follow()
    seen = len(fake.received)
    again = found.fleet.add(Node("127.0.0.1", fake.server.port))
    await found.watch.looked()
    assert up(again)
    assert len(fake.received) > seen


async def test_nobody_there_yet(ollama_node: NodeFactory, watched: WatchFactory) -> None:
    fake = await ollama_node()
    await fake.kill()
    found = watched(fake)
    await found.watch.looked()
    node = only(found.fleet)
    assert not up(node)
    assert node.poll_error == "it refused the connection"
    await fake.restart()
    await until(lambda: up(node) and node.models)
    assert node.health.allowance is None, "a first appearance is no return"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (reply(403, "", times=None), "it answered /api/version with status 403"),
        (rst(times=None), "it closed the connection without an answer"),
        (reply(508, "", times=None), "it is this proxy itself under another address"),
    ],
)
async def test_what_is_no_ollama_is_not_used(
    ollama_node: NodeFactory, watched: WatchFactory, fault: object, reason: str
) -> None:
    fake = await ollama_node()
    fake.fail(fault)  # type: ignore[arg-type]
    found = watched(fake)
    await until(lambda: found.lost)
    assert only(found.fleet).poll_error == reason


async def test_polls_carry_the_mark_that_reveals_a_loop(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    await watched(fake).watch.looked()
    assert {record.header("x-sollol-hops") for record in fake.received if record.method == "GET"} == {
        "proxy-1"
    }


async def test_a_broken_name_is_skipped_and_said_once(
    ollama_node: NodeFactory, watched: WatchFactory, caplog: pytest.LogCaptureFixture
) -> None:
    fake = await ollama_node()
    fake.store.models["odd"] = FakeModel("bad name")  # no Ollama would; something that plays one might
    found = watched(fake)
    await found.watch.looked()
    await found.watch.refresh(found.fleet)
    fake.store.add(FakeModel("new"))
    await found.watch.refresh(found.fleet)
    assert len(only(found.fleet).models) == 2
    (said,) = [r.getMessage() for r in caplog.records if "bad name" in r.getMessage()]
    assert said.startswith(
        f"{only(found.fleet).name} lists a model that nobody can ask for: invalid model name"
    )


async def test_shapes_are_asked_once_for_a_digest_in_the_fleet(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    model = FakeModel("llama3.2")
    fakes = [await ollama_node([model]), await ollama_node([model])]
    found = watched(*fakes)
    await until(lambda: model.digest in found.fleet.shapes)
    for fake in fakes:
        await rounds(fake, 2, "/api/tags")
    assert sum(len(fake.requests("/api/show")) for fake in fakes) == 1
    assert found.fleet.shapes[model.digest]["llama.block_count"] == model.block_count


async def test_a_shape_that_cannot_be_had_is_asked_for_a_few_times_only(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    fake.fail(reply(500, "no", path="/api/show", times=None))
    found = watched(fake)
    await fake.wait_received(shapes.TRIES, "/api/show")
    await rounds(fake, 2, "/api/tags")
    assert len(fake.requests("/api/show")) == shapes.TRIES
    assert found.fleet.shapes == {}


async def test_an_unchanged_list_is_not_parsed_again(
    ollama_node: NodeFactory, watched: WatchFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []

    def parse(body: bytes) -> list[Model]:
        parsed.append(len(body))
        return parse_tags(body)

    monkeypatch.setattr(node_watch, "parse_tags", parse)
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    await found.watch.refresh(found.fleet)
    assert len(parsed) == 1
    fake.store.add(FakeModel("new"))
    await found.watch.refresh(found.fleet)
    assert len(parsed) == 2


async def test_stopping_ends_all_polls_also_one_that_hangs(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    fake = await ollama_node()
    found = watched(fake)
    await found.watch.looked()
    fake.freeze()
    await rounds(fake, 1, "/api/version")
    await found.watch.stop()
    await found.watch.stop()
    assert not [t for t in asyncio.all_tasks() if fake.host_port in t.get_name()]
