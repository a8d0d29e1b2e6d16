"""``routing_metadata: body``: the seed's object in the final object, the answer otherwise untouched."""

from __future__ import annotations

import aiohttp
import orjson
import pytest

from proxy_addon import routing_metadata
from proxy_addon.record import Record
from tests.fakes.fixtures import NodeFactory
from tests.fakes.tokens import check_stream
from tests.proxy.asks import BY_NAME, ask
from tests.proxy.running import RunningProxy

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = "[[id:meta]] [[n:6]]"
SEED_KEYS = {"host", "task_type", "complexity", "decision_score", "actual_duration_ms", "queue_wait_ms"}


@pytest.mark.parametrize(
    "name", ["chat", "chat-whole", "generate", "openai-whole", "anthropic-whole", "embed"]
)
async def test_the_final_object_says_where_it_was_made(ollama_node: NodeFactory, name: str) -> None:
    node = await ollama_node()
    async with RunningProxy([node], routing_metadata="body") as proxy, aiohttp.ClientSession() as session:
        heard = await ask(session, proxy.url, BY_NAME[name], PROMPT)
        again = await ask(session, proxy.url, BY_NAME[name], PROMPT)  # the same connection goes on
    final = orjson.loads(heard.raw.strip().split(b"\n")[-1])
    found = final["_sollol_routing"]
    assert found.keys() >= SEED_KEYS
    assert (found["host"], found["request_id"]) == (node.host_port, heard.headers["x-sollol-request-id"])
    assert found["actual_duration_ms"] >= found["queue_wait_ms"] >= 0
    assert heard.ended and again.ended
    if name != "embed":
        check_stream(heard.text, PROMPT)


async def test_nothing_is_added_unless_asked_for(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    async with RunningProxy([node]) as proxy, aiohttp.ClientSession() as session:
        for name in ("chat", "chat-whole"):
            assert b"_sollol" not in (await ask(session, proxy.url, BY_NAME[name], PROMPT)).raw


def test_what_does_not_end_with_an_object_stays_as_it_is() -> None:
    rec = Record("id", "native", 0.0, "127.0.0.1")
    assert routing_metadata.add(b'{"a":1', rec, 1.0) == b'{"a":1'
    assert routing_metadata.add(b'{"a":1}\n', rec, 1.0).startswith(b'{"a":1,"_sollol_routing":{"host":null')
