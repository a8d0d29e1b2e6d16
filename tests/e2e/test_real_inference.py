"""Real tokens through real processes: embedded nodes, agents, the proxy and its command line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shard.models import DEMO_MODEL, demo_model_path
from tests.e2e.curl import curl
from tests.e2e.house import Sent
from tests.e2e.processes import Fleet, free_ports, until

PROMPTS = [
    "Question: Why is the sky blue?\nAnswer:",
    "Once upon a time there was a small",
    "The capital of France is",
    "A list of three fruits:",
]
OPTIONS = {"temperature": 0, "num_predict": 16, "repeat_penalty": 1.0}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    gguf = demo_model_path(folder / "hashes")
    assert gguf is not None, "the dev environment has the model's package"
    fleet = Fleet(folder, gguf, DEMO_MODEL, free_ports(2))
    try:
        fleet.start_all()
        yield fleet
    finally:
        ended = fleet.stop()
    assert set(ended.values()) == {0}, ended
    for name in ended:
        assert "Traceback" not in fleet.log(name), fleet.log(name)
    assert " ERROR " not in fleet.log("proxy")


@pytest.fixture(scope="module")
def answers(fleet: Fleet) -> dict[str, str]:
    """What a node itself answers, asked without the proxy."""
    client = ollama.Client(f"http://127.0.0.1:{fleet.node_ports[0]}", trust_env=False)
    return {
        prompt: client.generate(DEMO_MODEL, prompt, options=OPTIONS, raw=True).response for prompt in PROMPTS
    }


async def test_streams_of_three_clients_are_the_nodes_own_text(fleet: Fleet) -> None:
    prompt = PROMPTS[0]
    messages: Any = [{"role": "user", "content": prompt}]
    direct = ollama.AsyncClient(f"http://127.0.0.1:{fleet.node_ports[1]}")
    whole = await direct.chat(DEMO_MODEL, messages, options=OPTIONS)
    assert whole.message.content and whole.eval_count == 16

    parts = [
        part
        async for part in await ollama.AsyncClient(fleet.url).chat(
            DEMO_MODEL, messages, stream=True, options=OPTIONS
        )
    ]
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert len(parts) > 10
    assert (parts[-1].done, parts[-1].eval_count, parts[-1].done_reason) == (True, 16, "length")

    # These two APIs have no repeat_penalty; the node's own answer in their words is what counts.
    own = await _said(f"http://127.0.0.1:{fleet.node_ports[0]}", messages)
    assert all(own) and own[2:] == ("length", "max_tokens")
    assert await _said(fleet.url, messages) == own


async def _said(base: str, messages: Any) -> tuple[str, str, str | None, str | None]:
    """The streamed answers of the OpenAI and the Anthropic API, and why each ended."""
    asked: dict[str, Any] = {"model": DEMO_MODEL, "messages": messages, "max_tokens": 16}
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        chunks = [c async for c in await client.chat.completions.create(**asked, stream=True, temperature=0)]
    async with (
        anthropic.AsyncAnthropic(base_url=base, api_key="none", max_retries=0) as claude,
        claude.messages.stream(**asked, extra_body={"temperature": 0}) as events,
    ):
        pieces = [text async for text in events.text_stream]
        final = await events.get_final_message()
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, "".join(pieces), choices[-1].finish_reason, final.stop_reason


async def test_whole_answers_are_the_nodes_own_text(fleet: Fleet, answers: dict[str, str]) -> None:
    assert len(set(answers.values())) == len(PROMPTS) and all(answers.values())
    client = ollama.AsyncClient(fleet.url)

    async def one(prompt: str) -> None:
        answer = await client.generate(DEMO_MODEL, prompt, options=OPTIONS, raw=True)
        assert (answer.response, answer.done_reason) == (answers[prompt], "length")

    await asyncio.gather(*map(one, PROMPTS * 2))
    in_memory = [row["in_memory"] for row in orjson.loads(fleet.sollol("models", "--json"))]
    assert len(in_memory[0]) == 2  # both nodes worked


async def test_a_format_is_kept_and_the_proxy_port_serves_too(fleet: Fleet) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    # Free to put white space anywhere, the small model needs to see how it is done.
    hint = '{"n": 12}\n{"n": 7}\n'
    body = {"model": DEMO_MODEL, "prompt": hint, "format": schema, "stream": False}
    node = f"http://127.0.0.1:{fleet.node_ports[0]}"
    asked = orjson.dumps({**body, "options": {"temperature": 0, "num_predict": 48}}).decode()
    got = await curl("--proxy", fleet.regular, f"{node}/api/generate", "-d", asked)
    assert (got.code, got.status) == (0, 200)
    assert isinstance(orjson.loads(got.json["response"])["n"], int)
    refused = await curl("--proxy", fleet.regular, "http://example.test/")
    assert refused.status == 403


async def test_metrics_count_what_was_asked(fleet: Fleet) -> None:
    def counted(name: str, **labels: str) -> float:
        text = fleet.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return sum(
            sample.value
            for sample in families[name].samples
            if sample.name in (f"{name}_total", f"{name}_count") and labels.items() <= sample.labels.items()
        )

    successes = {"status": "success", "model": DEMO_MODEL}
    before = counted("sollol_requests", **successes)
    client = ollama.AsyncClient(fleet.url)
    for prompt in PROMPTS[:3]:
        await client.generate(DEMO_MODEL, prompt, options={"num_predict": 1})
    with pytest.raises(ollama.ResponseError):
        await client.generate("nonsense", "x")
    assert counted("sollol_requests", **successes) == before + 3
    dashboard = fleet.get("/api/dashboard").json()
    assert (dashboard["status"], dashboard["available_hosts"]) == ("healthy", 2)
    assert sum(host["requests_handled"] for host in dashboard["hosts"]) >= before + 3


async def test_the_command_line_tells_of_the_fleet(fleet: Fleet) -> None:
    sent = Sent()
    client = ollama.AsyncClient(fleet.url, event_hooks=sent.hooks())
    await client.generate(DEMO_MODEL, PROMPTS[2], options=OPTIONS)
    request_id, node = (sent.answers[-1][f"x-sollol-{name}"] for name in ("request-id", "node"))
    status = await asyncio.to_thread(fleet.sollol, "status", "--once")
    assert "healthy: 2 of 2 nodes up" in status
    assert all(f"127.0.0.1:{port}" in status for port in fleet.node_ports)
    for asked in ([request_id], []):
        explained = await asyncio.to_thread(fleet.sollol, "explain", *asked)
        assert f"request {request_id}" in explained and f"on {node}" in explained
        assert all(f"127.0.0.1:{port}" in explained for port in fleet.node_ports)
        assert "finish_time" in explained and "decode_s" in explained
    models = await asyncio.to_thread(fleet.sollol, "models")
    assert DEMO_MODEL in models and all(f"127.0.0.1:{port}" in models for port in fleet.node_ports)


async def test_a_node_killed_at_work_is_not_noticed(fleet: Fleet, answers: dict[str, str]) -> None:
    """SIGKILL in the middle of answers that are not streamed; the node comes back afterwards."""
    sent = Sent()
    client = ollama.AsyncClient(fleet.url, event_hooks=sent.hooks())
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(6)]
    longer = {**OPTIONS, "num_predict": 24}
    asked = [
        asyncio.create_task(client.generate(DEMO_MODEL, prompt, options=longer, raw=True))
        for prompt in prompts
    ]

    def busiest() -> str:
        """The node with most work, once both have some."""
        rows = sorted(_nodes(fleet), key=lambda row: row["in_flight"])
        return str(rows[-1]["name"]) if rows[0]["in_flight"] else ""

    victim = await asyncio.to_thread(until, busiest, "both nodes have work")
    port = int(victim.rpartition(":")[2])
    await asyncio.to_thread(fleet.kill_node, port)
    for prompt, answer in zip(prompts, await asyncio.gather(*asked), strict=True):
        assert answer.response.startswith(answers[prompt])
        assert (answer.done, answer.eval_count) == (True, 24)
    moved = [head for head in sent.answers if head["x-sollol-attempts"] != "1"]
    assert moved and all(head["x-sollol-node"] != victim for head in moved)
    made = fleet.explain(moved[0]["x-sollol-request-id"])
    assert made["outcome"] == "ok" and made["attempts"][0]["node"] == victim
    assert made["attempts"][0]["outcome"] == "died" and made["attempts"][-1]["outcome"] == "ok"

    fleet.start_node(port)

    def back() -> bool:
        return {row["name"]: row["state"] for row in _nodes(fleet)}[victim] in ("up", "returning")

    await asyncio.to_thread(until, back, "the node is back")


def _nodes(fleet: Fleet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = fleet.get("/sollol/nodes").json()["nodes"]
    return rows
