"""The official JavaScript client in node through the real proxy; ``scripts/test_deps.sh`` installs it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.e2e.house import CHAT, EMBED, LONE, REMOTE, House
from tests.fakes.engine import embedding
from tests.fakes.faults import Fault
from tests.fakes.tokens import check_stream, expected_text, expected_thinking

JS = Path(__file__).parent / "js"
PROMPT = "[[id:hello]] [[n:40]] Say something."
MESSAGES = [{"role": "user", "content": PROMPT}]
Call = dict[str, Any]


async def js(house: House, *calls: Call, **how: Any) -> list[dict[str, Any]]:
    """What each call gave: ``answer`` or ``parts``, and ``error`` (with ``name``, ``status``) if it threw."""
    assert (JS / "node_modules/ollama").is_dir(), "run scripts/test_deps.sh: ollama-js is not installed"
    process = await asyncio.create_subprocess_exec(
        *("node", str(JS / "calls.mjs")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    asked = orjson.dumps({"host": house.url, "calls": calls, **how})
    try:
        out, err = await process.communicate(asked)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0 and not err, err.decode()
    given: list[dict[str, Any]] = orjson.loads(out)
    return given


def call(method: str, request: Any = None, **how: Any) -> Call:
    return {"method": method, **({} if request is None else {"request": request}), **how}


async def test_chat_and_generate(house: House) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"required": ["at"]}}}
    streamed, whole, generated, thought, called = await js(
        house,
        call("chat", {"model": CHAT, "messages": MESSAGES, "stream": True}),
        call("chat", {"model": CHAT, "messages": MESSAGES, "options": {"num_predict": 7}}),
        call("generate", {"model": CHAT, "prompt": PROMPT, "stream": True, "keep_alive": "1h"}),
        call("chat", {"model": CHAT, "messages": MESSAGES, "stream": True, "think": True}),
        call("chat", {"model": CHAT, "messages": MESSAGES, "tools": [tool], "format": "json"}),
    )
    check_stream("".join(part["message"]["content"] for part in streamed["parts"]), PROMPT)
    assert [part["done"] for part in streamed["parts"]] == [False] * 40 + [True]
    assert whole["answer"]["message"]["content"] == expected_text(PROMPT, 7)
    assert whole["answer"]["done_reason"] == "length"
    check_stream("".join(part["response"] for part in generated["parts"]), PROMPT)
    thinking = "".join(part["message"].get("thinking", "") for part in thought["parts"])
    assert thinking == expected_thinking(PROMPT)
    [tool_call] = called["answer"]["message"]["tool_calls"]
    assert tool_call["function"] == {"index": 0, "name": "look", "arguments": {"at": "hello"}}
    got = [got.json for _, got in house.reached("/api/chat")]
    assert sorted(body["stream"] for body in got) == [False, False, True, True]
    assert house.only("/api/generate").json["keep_alive"] == "1h"


async def test_the_other_methods(house: House) -> None:
    given = await js(
        house,
        call("list"),
        call("show", {"model": LONE}),
        call("embed", {"model": EMBED, "input": ["one", "two"]}),
        call("embeddings", {"model": EMBED, "prompt": "one"}),
        call("pull", {"model": REMOTE.name, "stream": True}),
        call("copy", {"source": REMOTE.name, "destination": "mine"}),
        call("push", {"model": "mine", "stream": True}),
        call("delete", {"model": REMOTE.name}),
        call("create", {"model": "pirate", "from": LONE, "system": "Arr.", "stream": True}),
        call("generate", {"model": "pirate", "prompt": PROMPT}),
        call("version"),
        call("ps"),
    )
    assert not [item for item in given if "error" in item]
    listed, shown, embedded, old, pulled, copied, pushed, deleted, made, said, version, ps = given
    assert {row["model"] for row in listed["answer"]["models"]} == {
        f"{n}:latest" for n in (CHAT, EMBED, LONE)
    }
    assert shown["answer"]["details"]["family"] == "llama"
    assert [len(vector) for vector in embedded["answer"]["embeddings"]] == [64, 64]
    assert old["answer"]["embedding"] == embedding("one", 64)
    completed = [row.get("completed", 0) for row in pulled["parts"] if "digest" in row]
    assert completed == sorted(completed) and completed[-1] == REMOTE.size
    assert [rows["parts"][-1]["status"] for rows in (pulled, pushed, made)] == ["success"] * 3
    assert copied["answer"] == deleted["answer"] == {"status": "success"}
    check_stream(said["answer"]["response"], PROMPT)
    assert version["answer"]["version"] == house.nodes[0].version
    assert set(ps["answer"]) == {"models"}


async def test_errors_are_as_from_ollama(house: House) -> None:
    given = await js(
        house,
        call("chat", {"model": "x", "messages": MESSAGES}),
        call("chat", {"model": "x", "messages": MESSAGES, "stream": True}),
        call("show", {"model": "x"}),
        call("pull", {"model": "x", "stream": True}),
    )
    assert [(item["status"], item["error"]) for item in given[:3]] == [(404, "model 'x' not found")] * 3
    assert {item["name"] for item in given[:3]} == {"ResponseError"}
    assert given[3]["error"] == "pull model manifest: file does not exist"


async def test_a_node_that_dies_in_its_answer_throws(house: House) -> None:
    for node in house.nodes:
        node.fail(Fault("rst", "after_chunks", chunks=5, path="/api/chat"))
    [given] = await js(house, call("chat", {"model": CHAT, "messages": MESSAGES, "stream": True}))
    assert "failed in mid-answer" in given["error"]
    text = "".join(part["message"]["content"] for part in given["parts"])
    assert check_stream(text, PROMPT, complete=False) == 5


async def test_leaving_a_stream_stops_the_node(house: House) -> None:
    request = {"model": CHAT, "prompt": "[[id:long]] [[n:20000]]", "stream": True}
    [given] = await js(house, call("generate", request, leave_after=3))
    assert given["name"] == "AbortError"
    node, got = await house.wait_one("/api/generate")
    assert (await node.wait_finished(got)).outcome == "cancelled"


async def test_twenty_streams_at_once_do_not_mix(house: House) -> None:
    prompts = [f"[[id:client{number}]] [[n:60]] hello" for number in range(20)]
    calls = [call("generate", {"model": CHAT, "prompt": prompt, "stream": True}) for prompt in prompts]
    for prompt, item in zip(prompts, await js(house, *calls, together=True), strict=True):
        check_stream("".join(part["response"] for part in item["parts"]), prompt)


@pytest.mark.parametrize(
    ("origin", "admitted"), [("http://localhost:3000", True), ("https://evil.test", False)]
)
async def test_a_pages_origin_is_judged_here_and_kept_from_the_node(
    house: House, origin: str, admitted: bool
) -> None:
    request = {"model": CHAT, "messages": MESSAGES}
    [given] = await js(house, call("chat", request), headers={"Origin": origin})
    if admitted:
        check_stream(given["answer"]["message"]["content"], PROMPT)
        assert house.only("/api/chat").header("origin") is None
    else:
        assert given["status"] == 403 and origin in given["error"]
        assert house.reached("/api/chat") == []
