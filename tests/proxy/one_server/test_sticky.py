from __future__ import annotations

import asyncio
import hashlib

import pytest

from proxy_addon.ask import BadRequest
from proxy_addon.fleet.node import Node
from proxy_addon.one_server.sticky import Memory, blob_digest, choose, digests_of
from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.one_server.build import model, node
from tests.proxy.one_server.house import house, said
from tests.proxy.one_server.test_pull import report

BLOB = b"a model's weights"
HEX = hashlib.sha256(BLOB).hexdigest()
DIGEST = f"sha256:{HEX}"
PATH = f"/api/blobs/{DIGEST}"
D1, D2 = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def test_memory_forgets_in_time() -> None:
    memory = Memory(capacity=10, lifetime_s=5)
    memory.put("x", "a", 100.0)
    assert memory.get("x", 104.9) == "a" and memory.get("x", 105.0) is None
    memory.put("x", "b", 106.0)
    assert memory.get("x", 107.0) == "b"
    memory.forget("x")
    assert memory.get("x", 107.0) is None and memory.get("never", 0.0) is None


def test_memory_is_bounded_the_oldest_goes() -> None:
    memory = Memory(capacity=2, lifetime_s=5)
    for key in ("x", "y", "x", "z"):
        memory.put(key, key, 0.0)
    assert [memory.get(key, 1.0) for key in "xyz"] == ["x", None, "z"]


@pytest.mark.parametrize(
    ("held", "from_holders", "favourite", "chosen"),
    [
        ({}, set(), None, "big"),  # the most room
        ({}, set(), "small:11434", "small"),
        ({}, {"mid:11434"}, "small:11434", "mid"),
        ({"small:11434": {D1, D2}, "mid:11434": {D1}}, {"mid:11434"}, "big:11434", "small"),
        ({"small:11434": {D1}, "mid:11434": {D1}}, {"mid:11434"}, "small:11434", "mid"),
    ],
)
def test_choose_puts_blobs_before_the_base_before_habit_before_room(
    held: dict[str, set[str]], from_holders: set[str], favourite: str | None, chosen: str
) -> None:
    nodes: list[Node] = [
        node("small", report=report(1)),
        node("big", report=report(9)),
        node("mid", report=report(5)),
    ]
    assert choose(nodes, held, from_holders, favourite).host == chosen


def test_digests_of_reads_files_and_adapters() -> None:
    body = {
        "files": {"a.gguf": D1.upper().replace("SHA", "sha"), "b": 7},
        "adapters": {"lora": D2.replace(":", "-")},
        "from": "x",
        "license": D1,
    }
    assert digests_of(body) == {D1, D2}
    assert digests_of({"files": None, "adapters": [D1]}) == set()


@pytest.mark.parametrize("text", ["sha256:12", "md5:" + "1" * 64, "sha256:" + "g" * 64, D1 + "0"])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as refused:
        blob_digest(f"/api/blobs/{text}?x=1")
    assert (refused.value.status, refused.value.message) == (400, "invalid digest format")


async def test_blobs_and_create_of_one_client_meet_on_one_node(ollama_node: NodeFactory) -> None:
    nodes = [await ollama_node([]) for _ in range(3)]
    second = b"an adapter"
    digest2 = f"sha256:{hashlib.sha256(second).hexdigest()}"
    async with house(*nodes) as fleet:
        for path, blob in ((PATH, BLOB), (f"/api/blobs/{digest2}", second)):
            assert (await fleet.ask("HEAD", path)).status_code == 404
            flow, rec = fleet.flow("POST", path, blob)
            await fleet.run(flow, rec)
            assert flow.request.stream is True and rec.placed
            await fleet.carry(flow)
            assert flow.response and flow.response.status_code == 201
            assert (await fleet.ask("HEAD", path)).status_code == 200
        body = {"model": "mine", "files": {"m.gguf": DIGEST}, "adapters": {"l": digest2}, "stream": True}
        made = await fleet.ask("POST", "/api/create", body)
        assert made.content and made.content.endswith(b'{"status":"success"}\n')
        assert [row["name"] for row in said(await fleet.ask("GET", "/api/tags"))["models"]] == ["mine:latest"]
    [holder] = [each for each in nodes if each.store.find("mine")]
    assert set(holder.store.blobs) >= {DIGEST, digest2}
    assert [each for each in nodes if each.requests(method="POST")] == [holder]


async def test_the_create_finds_its_blobs_from_another_address(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    async with house(a, b) as fleet:
        fleet.node(b).report = report(9)
        assert (await fleet.ask("POST", PATH, BLOB, client="10.0.0.7")).status_code == 201
        fleet.node(b).report = None
        fleet.node(a).report = report(9)
        a.forget()
        body = {"model": "mine", "files": {"m.gguf": DIGEST}}
        assert (await fleet.ask("POST", "/api/create", body, client="10.0.0.8")).status_code == 200
    assert b.store.find("mine") and not a.requests(method="HEAD")


async def test_the_create_finds_blobs_that_the_fleet_has_not_seen_uploaded(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    b.store.blobs[DIGEST] = len(BLOB)
    async with house(a, b) as fleet:
        await fleet.ask("POST", "/api/create", {"model": "mine", "files": {"m.gguf": DIGEST}})
    assert b.store.find("mine")


async def test_a_client_is_sent_where_its_first_blob_is_already(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    b.store.blobs[DIGEST] = len(BLOB)
    async with house(a, b) as fleet:
        fleet.node(a).report = report(9)  # would have the most room
        assert (await fleet.ask("HEAD", PATH)).status_code == 200
        other = b"another blob"
        digest = f"sha256:{hashlib.sha256(other).hexdigest()}"
        assert (await fleet.ask("POST", f"/api/blobs/{digest}", other)).status_code == 201
    assert digest in b.store.blobs


async def test_head_is_200_only_where_the_create_will_be(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    b.store.blobs[DIGEST] = len(BLOB)
    async with house(a, b) as fleet:
        fleet.node(a).report = report(9)
        assert (await fleet.ask("HEAD", f"/api/blobs/{D1}")).status_code == 404  # chooses a
        assert (await fleet.ask("HEAD", PATH)).status_code == 404
        assert (await fleet.ask("HEAD", PATH, client="10.0.0.8")).status_code == 200


async def test_a_blob_that_is_there_is_answered_before_it_is_read(ollama_node: NodeFactory) -> None:
    a = await ollama_node([])
    a.store.blobs[DIGEST] = len(BLOB)
    async with house(a) as fleet:
        flow, rec = fleet.flow("POST", PATH, BLOB)
        await fleet.run(flow, rec)
        assert flow.response and flow.response.status_code == 200 and not rec.placed
    assert not a.requests(method="POST")


async def test_a_malformed_digest_is_refused_before_the_upload(ollama_node: NodeFactory) -> None:
    a = await ollama_node([])
    async with house(a) as fleet:
        flow, rec = fleet.flow("POST", "/api/blobs/sha256:12", BLOB)
        await fleet.run(flow, rec)
        assert flow.response
        assert (flow.response.status_code, said(flow.response)) == (400, {"error": "invalid digest format"})
        head = await fleet.ask("HEAD", "/api/blobs/sha256:12")
        assert head.status_code == 400 and head.raw_content == b""
    assert not any("blobs" in seen.path for seen in a.received)


async def test_a_create_goes_to_a_node_that_need_not_pull_its_base(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node(["gemma3"])
    async with house(a, b) as fleet:
        fleet.node(a).report = report(9)
        made = await fleet.ask(
            "POST", "/api/create", {"model": "mine", "from": "Gemma3", "system": "be brief"}
        )
        assert made.status_code == 200 and b.store.find("mine")
        assert fleet.refreshed == [b.host_port]
    assert not a.requests("/api/create")


async def test_the_next_create_of_a_client_may_go_elsewhere(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node(["base"]), await ollama_node(["base"])
    async with house(a, b) as fleet:
        fleet.node(a).report = report(9)
        assert (await fleet.ask("HEAD", PATH)).status_code == 404
        fleet.node(a).report, fleet.node(b).report = None, report(9)
        for name in ("one", "two"):
            await fleet.ask("POST", "/api/create", {"model": name, "from": "base"})
    assert a.store.find("one") and b.store.find("two")


async def test_a_client_whose_node_went_down_is_sent_to_another(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    async with house(a, b) as fleet:
        fleet.node(a).report = report(9)
        assert (await fleet.ask("HEAD", PATH)).status_code == 404
        fleet.down(a)
        assert (await fleet.ask("POST", PATH, BLOB)).status_code == 201
    assert DIGEST in b.store.blobs


async def test_two_clients_at_once_do_not_mix(ollama_node: NodeFactory) -> None:
    a, b = await ollama_node([]), await ollama_node([])
    a.store.blobs[D1] = b.store.blobs[D2] = 1
    async with house(a, b) as fleet:
        heads = [
            fleet.ask("HEAD", f"/api/blobs/{d}", client=c) for d, c in ((D1, "10.0.0.1"), (D2, "10.0.0.2"))
        ]
        assert [head.status_code for head in await asyncio.gather(*heads)] == [200, 200]
        for digest, client, holder in ((D1, "10.0.0.1", a), (D2, "10.0.0.2", b)):
            await fleet.ask("POST", "/api/create", {"model": "m", "files": {"f": digest}}, client=client)
            assert holder.store.find("m")


def test_the_base_counts_at_the_fleets_digest_only() -> None:
    old, new = node("old", model("base", "a" * 64, day=1)), node("new", model("base", "b" * 64, day=2))
    assert choose([old, new], {}, {new.name}).host == "new"


async def test_an_invalid_name_gets_the_nodes_words(ollama_node: NodeFactory) -> None:
    a = await ollama_node([FakeModel("base")])
    async with house(a) as fleet:
        made = await fleet.ask("POST", "/api/create", {"model": "mine", "from": "::"})
    assert b"error" in (made.content or b"") and a.requests("/api/create")
