from __future__ import annotations

from typing import Any

import pytest

from proxy_addon.ask import BadRequest
from proxy_addon.one_server import pin
from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.one_server.build import fleet, model, node
from tests.proxy.one_server.house import house, said

KEY = "registry.ollama.ai/library/mine:latest"


def test_the_first_ollama_by_name_unless_one_is_configured() -> None:
    nodes = fleet(node("c"), node("b"), node("a", kind="shard"))
    assert pin.signed_in(nodes, None, 1.0).host == "b"
    assert pin.signed_in(nodes, "c:11434", 1.0).host == "c"


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("x:11434", "the signed-in node x:11434 is not in the fleet (a:11434, b:11434)"),
        ("a:11434", "the signed-in node a:11434 does not answer: connection refused"),
    ],
)
def test_no_other_node_stands_in_for_the_signed_in_one(wanted: str, sentence: str) -> None:
    nodes = fleet(node("a", poll_error="connection refused"), node("b"))
    with pytest.raises(BadRequest) as refused:
        pin.signed_in(nodes, wanted, 1.0)
    assert (refused.value.status, refused.value.message) == (503, sentence)


def test_a_push_says_who_has_the_model_if_the_signed_in_node_has_not() -> None:
    nodes = fleet(node("a"), node("b", model("mine")))
    assert pin.pusher(nodes, "b:11434", "mine", KEY, 1.0).host == "b"
    with pytest.raises(BadRequest) as refused:
        pin.pusher(nodes, "a:11434", "mine", KEY, 1.0)
    sentence = "model 'mine' not found on a:11434, the signed-in node; it is on b:11434"
    assert (refused.value.status, refused.value.message) == (404, sentence)


ASKS = [
    ("POST", "/api/me", b""),
    ("POST", "/api/me?ts=1", {}),
    ("POST", "/api/signout", b""),
    ("DELETE", "/api/user/keys/abc", b""),
    ("POST", "/api/experimental/web_search", {"query": "x"}),
    ("POST", "/api/experimental/web_fetch", {"url": "x"}),
    ("GET", "/api/experimental/model-recommendations", b""),
    ("POST", "/api/push", {"model": "llama3.2"}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKS)
async def test_what_needs_an_identity_goes_to_the_signed_in_node(
    ollama_node: NodeFactory, method: str, path: str, body: Any
) -> None:
    a, b = await ollama_node(signed_in=False), await ollama_node()
    async with house(a, b, signed_in_node=b.host_port) as served:
        answer = await served.ask(method, path, body)
    assert answer.status_code == 200
    [seen] = b.requests(path.partition("?")[0])
    assert seen.query == path.partition("?")[2] and not a.requests(path.partition("?")[0])


async def test_show_of_a_cloud_model_goes_to_the_signed_in_node(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(), await ollama_node([FakeModel("gpt-oss:120b-cloud")])
    async with house(a, b, signed_in_node=b.host_port) as served:
        served.node(b).models.clear()  # a cloud model need not be listed
        shown = await served.ask("POST", "/api/show", {"model": "gpt-oss:120b-cloud"})
    assert shown.status_code == 200 and shown.headers["x-sollol-node"] == b.host_port
    assert not a.requests("/api/show")


async def test_a_cloud_model_is_pulled_where_it_can_be_used(ollama_node: NodeFactory) -> None:
    stub = FakeModel("gpt-oss:120b-cloud", size=400)
    a, b = await ollama_node([], remote=[stub]), await ollama_node([], remote=[stub])
    async with house(a, b, signed_in_node=b.host_port) as served:
        rows = await served.stream("POST", "/api/pull", {"model": "gpt-oss:120b-cloud"})
    assert rows[-1] == {"status": "success"} and b.store.find("gpt-oss:120b-cloud")
    assert not a.requests("/api/pull")


async def test_a_cloud_chat_is_pinned(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(), await ollama_node()
    async with house(a, b, signed_in_node=b.host_port) as served:
        flow, rec = served.flow(
            "POST", "/v1/chat/completions", {"model": "gpt-oss:120b-cloud", "messages": []}
        )
        await served.run(flow, rec)
        assert not rec.placed
        await served.server.pin(flow)
        assert rec.placed and f"{flow.request.host}:{flow.request.port}" == b.host_port
        assert flow.request.host_header == b.host_port
        served.down(b)
        flow, rec = served.flow(
            "POST", "/v1/chat/completions", {"model": "gpt-oss:120b-cloud", "messages": []}
        )
        await served.run(flow, rec)
        await served.server.pin(flow)
        assert flow.response and flow.response.status_code == 503 and not rec.placed
        assert said(flow.response)["error"]["message"].startswith(
            f"the signed-in node {b.host_port} does not"
        )
