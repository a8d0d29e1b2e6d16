from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.fakes.faults import reply
from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.one_server.house import House, house, said

OLD = FakeModel("gemma3", version="1", modified_at=datetime(2026, 8, 1, tzinfo=UTC))
NEW = FakeModel("gemma3", version="2", modified_at=datetime(2026, 8, 2, tzinfo=UTC), system="new")


async def test_tags_and_models_are_those_of_all_nodes(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(["llama3.2", "qwen3:8b"]), await ollama_node([NEW])
    async with house(a, b) as fleet:
        tags = await fleet.ask("GET", "/api/tags")
        assert tags.headers["content-type"] == "application/json; charset=utf-8"
        assert {row["name"] for row in said(tags)["models"]} == {
            "llama3.2:latest",
            "qwen3:8b",
            "gemma3:latest",
        }
        listed = said(await fleet.ask("GET", "/v1/models"))["data"]
        assert {row["id"] for row in listed} == {"llama3.2:latest", "qwen3:8b", "gemma3:latest"}
        one = said(await fleet.ask("GET", "/v1/models/Gemma3"))
        assert one == {"id": "Gemma3", "object": "model", "created": 1785628800, "owned_by": "library"}
    assert not any(r.path.startswith("/v1/") for r in a.received + b.received)


async def test_the_root_and_the_version(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(), await ollama_node()
    async with house(a, b) as fleet:
        fleet.node(b).version = "0.24.0"
        root = await fleet.ask("GET", "/")
        assert root.content == b"Ollama is running"
        assert said(await fleet.ask("GET", "/api/version")) == {"version": "0.24.0"}
        assert said(await fleet.ask("GET", "/api/status")) == {"cloud": {"disabled": False, "source": "none"}}


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_head_has_the_headers_of_get_and_no_body(ollama_node: NodeFactory, path: str) -> None:
    async with house(await ollama_node()) as fleet:
        whole, head = await fleet.ask("GET", path), await fleet.ask("HEAD", path)
    assert head.status_code == 200 and head.raw_content == b""
    assert head.headers["content-length"] == str(len(whole.raw_content or b"")) != "0"
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_show_asks_a_node_that_has_the_fleets_digest(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([OLD]), await ollama_node([NEW])
    async with house(a, b) as fleet:
        shown = await fleet.ask("POST", "/api/show", {"model": "GEMMA3"})
    assert said(shown)["system"] == "new" and shown.headers["x-sollol-node"] == b.host_port
    assert not a.requests("/api/show")


async def test_show_goes_on_to_the_next_node(ollama_node: NodeFactory) -> None:
    gone, stale, sick, well = [await ollama_node([OLD]) for _ in range(4)]
    async with house(gone, stale, sick, well) as fleet:
        await gone.kill()
        stale.store.remove("gemma3")
        sick.fail(reply(500, "disk trouble", path="/api/show"))
        shown = await fleet.ask("POST", "/api/show", {"model": "gemma3"})
    assert shown.status_code == 200 and shown.headers["x-sollol-node"] == well.host_port


async def test_show_keeps_a_nodes_own_words(ollama_node: NodeFactory) -> None:
    a = await ollama_node([OLD])
    async with house(a) as fleet:
        a.fail(reply(500, "disk trouble", path="/api/show"))
        shown = await fleet.ask("POST", "/api/show", {"model": "gemma3"})
        assert (shown.status_code, said(shown)) == (500, {"error": "disk trouble"})


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("POST", "/api/show", {"model": "x"}, {"error": "model 'x' not found"}),
        ("POST", "/api/copy", {"source": "x", "destination": "y"}, {"error": "model 'x' not found"}),
        ("DELETE", "/api/delete", {"model": "x"}, {"error": "model 'x' not found"}),
        ("POST", "/api/push", {"model": "x"}, {"error": "model 'x' not found"}),
        (
            "GET",
            "/v1/models/x",
            None,
            {
                "error": {
                    "message": "model 'x' not found",
                    "type": "not_found_error",
                    "param": None,
                    "code": None,
                }
            },
        ),
    ],
)
async def test_a_model_that_no_node_has_is_not_found(
    ollama_node: NodeFactory, method: str, path: str, body: Any, error: dict[str, Any]
) -> None:
    async with house(await ollama_node(), await ollama_node()) as fleet:
        answer = await fleet.ask(method, path, body)
    assert (answer.status_code, said(answer)) == (404, error)


async def test_a_model_whose_only_nodes_are_down_is_not_called_missing(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([OLD]), await ollama_node()
    async with house(a, b) as fleet:
        fleet.down(a, "no answer in 3 s")
        answer = await fleet.ask("POST", "/api/show", {"model": "gemma3"})
    assert answer.status_code == 503
    why = f"model 'gemma3' is only on nodes that do not answer: {a.host_port} (no answer in 3 s)"
    assert said(answer) == {"error": why}


ASKS = [
    ("GET", "/api/tags", None),
    ("GET", "/api/version", None),
    ("GET", "/api/ps", None),
    ("GET", "/v1/models", None),
    ("POST", "/api/show", {"model": "llama3.2"}),
    ("POST", "/api/pull", {"model": "llama3.2"}),
    ("DELETE", "/api/delete", {"model": "llama3.2"}),
    ("POST", "/api/create", {"model": "mine", "from": "llama3.2"}),
    ("POST", f"/api/blobs/sha256:{'0' * 64}", b"x"),
    ("POST", "/api/me", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKS)
async def test_without_any_node_each_node_is_named_with_its_trouble(
    ollama_node: NodeFactory, method: str, path: str, body: Any
) -> None:
    a, b = await ollama_node(), await ollama_node()
    async with house(a, b) as fleet:
        fleet.down(a)
        fleet.node(b).polled_s = None
        answer = await fleet.ask(method, path, body)
    assert answer.status_code == 503
    error = said(answer)["error"]
    text = error["message"] if isinstance(error, dict) else error
    assert text == (
        f"no node of the fleet answers: {a.host_port} (connection refused), {b.host_port} (not polled yet)"
    )


async def test_a_fleet_without_nodes_says_how_to_name_some() -> None:
    async with house() as fleet:
        answer = await fleet.ask("GET", "/api/tags")
    assert (answer.status_code, said(answer)["error"][:28]) == (503, "the fleet has no nodes: name")


async def resident_on(fleet: House, *nodes: Any) -> None:
    for node in nodes:
        async with fleet.session.post(
            f"{node.url}/api/generate", json={"model": "llama3.2", "stream": False}
        ) as done:
            assert done.status == 200
    await fleet.refresh(fleet.fleet)


@pytest.mark.parametrize(
    ("path", "body", "empty"),
    [
        ("/api/generate", {"prompt": ""}, {"response": ""}),
        ("/api/chat", {"messages": []}, {"message": {"role": "assistant", "content": ""}}),
    ],
)
async def test_unload_reaches_every_node_that_holds_the_model(
    ollama_node: NodeFactory, path: str, body: dict[str, Any], empty: dict[str, Any]
) -> None:
    a, b, other = await ollama_node(), await ollama_node(), await ollama_node(["qwen3"])
    async with house(a, b, other) as fleet:
        await resident_on(fleet, a, b)
        assert len(said(await fleet.ask("GET", "/api/ps"))["models"]) == 1
        flow, rec = fleet.flow("POST", path, {"model": "Llama3.2", "keep_alive": 0, **body})
        await fleet.run(flow, rec)
        assert flow.response is None and rec.ask and rec.ask.unload
        await fleet.server.unload(flow)
        assert flow.response
        answer = said(flow.response)
        assert datetime.fromisoformat(answer.pop("created_at")).tzinfo == UTC
        assert answer == {"model": "Llama3.2", **empty, "done": True, "done_reason": "unload"}
        assert said(await fleet.ask("GET", "/api/ps")) == {"models": []}
    assert not a.scheduler.runners and not b.scheduler.runners
    assert not other.requests(path)


async def test_unload_reaches_a_model_that_no_poll_has_seen_resident(ollama_node: NodeFactory) -> None:
    a = await ollama_node()
    async with house(a) as fleet:
        await resident_on(fleet, a)
        fleet.node(a).resident.clear()
        flow, rec = fleet.flow("POST", "/api/generate", {"model": "llama3.2", "keep_alive": "0s"})
        await fleet.run(flow, rec)
        await fleet.server.unload(flow)
    assert flow.response and flow.response.status_code == 200 and not a.scheduler.runners


async def test_unload_of_a_model_whose_only_node_is_down(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(), await ollama_node([])
    async with house(a, b) as fleet:
        fleet.down(a)
        flow, rec = fleet.flow("POST", "/api/generate", {"model": "llama3.2", "keep_alive": 0})
        await fleet.run(flow, rec)
        await fleet.server.unload(flow)
    assert flow.response and flow.response.status_code == 503 and not b.requests("/api/generate")


async def test_unloading_an_unknown_model_is_a_404(ollama_node: NodeFactory) -> None:
    async with house(await ollama_node()) as fleet:
        flow, rec = fleet.flow("POST", "/api/generate", {"model": "x", "keep_alive": 0})
        await fleet.run(flow, rec)
        await fleet.server.unload(flow)
        assert flow.response and flow.response.status_code == 404
        assert said(flow.response) == {"error": "model 'x' not found"}


async def test_delete_reaches_every_node_and_the_next_tags_know_it(ollama_node: NodeFactory) -> None:
    a, b, c = await ollama_node([OLD]), await ollama_node([NEW]), await ollama_node(["llama3.2"])
    async with house(a, b, c) as fleet:
        answer = await fleet.ask("DELETE", "/api/delete", {"model": "gemma3"})
        assert (answer.status_code, answer.content) == (200, b"")
        names = [row["name"] for row in said(await fleet.ask("GET", "/api/tags"))["models"]]
        assert names == ["llama3.2:latest"]
        again = await fleet.ask("DELETE", "/api/delete", {"model": "gemma3"})
        assert again.status_code == 404
    assert not a.store.find("gemma3") and not b.store.find("gemma3")


async def test_delete_is_done_if_one_node_did_it(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([OLD]), await ollama_node([OLD])
    async with house(a, b) as fleet:
        a.fail(reply(500, "disk trouble", path="/api/delete"))
        assert (await fleet.ask("DELETE", "/api/delete", {"model": "gemma3"})).status_code == 200
        a.fail(reply(500, "disk trouble", path="/api/delete"))
        answer = await fleet.ask("DELETE", "/api/delete", {"model": "gemma3"})
        assert (answer.status_code, said(answer)) == (500, {"error": "disk trouble"})


async def test_delete_says_whom_it_did_not_reach_and_leaves_coordinators_alone(
    ollama_node: NodeFactory, caplog: pytest.LogCaptureFixture
) -> None:
    a, lost, shard = await ollama_node([OLD]), await ollama_node([OLD]), await ollama_node(["llama3.2"])
    async with house(a, lost, shard) as fleet:
        fleet.down(lost)
        fleet.node(shard).kind = "shard"
        assert (await fleet.ask("DELETE", "/api/delete", {"model": "gemma3"})).status_code == 200
        assert f"does not reach {lost.host_port}, which will still have it" in caplog.text
    assert not shard.requests("/api/delete") and lost.store.find("gemma3")


async def test_copy_happens_on_every_node_that_has_the_source(ollama_node: NodeFactory) -> None:
    a, b, c = await ollama_node([NEW]), await ollama_node([NEW]), await ollama_node([OLD])
    async with house(a, b, c) as fleet:
        body = {"source": "gemma3", "destination": "mine/backup:v1"}
        assert (await fleet.ask("POST", "/api/copy", body)).status_code == 200
        names = [row["name"] for row in said(await fleet.ask("GET", "/api/tags"))["models"]]
        assert names == ["mine/backup:v1", "gemma3:latest"]
    assert a.store.find("mine/backup:v1") and b.store.find("mine/backup:v1")
    assert not c.store.find("mine/backup:v1")


async def test_copy_without_destination_is_refused_in_the_nodes_words(ollama_node: NodeFactory) -> None:
    async with house(await ollama_node([NEW])) as fleet:
        answer = await fleet.ask("POST", "/api/copy", {"source": "gemma3", "destination": ""})
    assert (answer.status_code, said(answer)) == (400, {"error": 'destination "" is invalid'})
