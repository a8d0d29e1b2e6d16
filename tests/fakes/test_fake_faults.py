"""Every fault at every moment, seen from a raw socket."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.fakes import faults
from tests.fakes.faults import Fault
from tests.fakes.fixtures import NodeFactory
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.raw import ask, request_bytes
from tests.fakes.tokens import check_stream

PROMPT = "x [[id:abc]] [[n:5]]"
GENERATE = request_bytes("/api/generate", {"model": "llama3.2", "prompt": PROMPT})
WHOLE = request_bytes("/api/generate", {"model": "llama3.2", "prompt": PROMPT, "stream": False})
OPENAI = request_bytes(
    "/v1/chat/completions",
    {"model": "llama3.2", "stream": True, "messages": [{"role": "user", "content": PROMPT}]},
)
ANTHROPIC = request_bytes(
    "/v1/messages",
    {"model": "llama3.2", "stream": True, "max_tokens": 9, "messages": [{"role": "user", "content": PROMPT}]},
)


async def healthy(node: FakeOllama) -> None:
    """The node answers the next request as if nothing had been."""
    answer = await ask(node.host_port, GENERATE)
    assert answer.ending == "complete" and len(answer.chunks) == 6
    assert check_stream("".join(line["response"] for line in answer.lines), PROMPT) == 5


@pytest.mark.parametrize("do", ["rst", "fin"])
@pytest.mark.parametrize(
    ("at", "where", "status", "chunks"),
    [
        ("accept", {}, None, 0),
        ("before_head", {}, None, 0),
        ("mid_head", {}, None, 0),
        ("after_head", {}, 200, 0),
        ("mid_line", {"chunks": 0}, 200, 1),
        ("mid_line", {"chunks": 2}, 200, 3),
        ("after_chunks", {"chunks": 3}, 200, 3),
        ("before_last", {}, 200, 5),
        ("before_end", {}, 200, 6),
        ("after_bytes", {"bytes": 1}, None, 0),
        ("after_bytes", {"bytes": 0}, None, 0),
        ("after_bytes", {"bytes": 300}, 200, None),
    ],
)
async def test_cut_at_each_moment(
    ollama_node: NodeFactory, do: str, at: str, where: dict[str, int], status: int | None, chunks: int | None
) -> None:
    node = await ollama_node()
    node.fail(Fault(do, at, **where))  # type: ignore[arg-type]
    answer = await ask(node.host_port, GENERATE)
    assert answer.ending == do
    assert answer.status == status
    if at == "after_bytes":
        assert len(answer.raw) == where["bytes"]
    if chunks is not None:
        assert len(answer.chunks) == chunks
    if at == "mid_line":
        with pytest.raises(json.JSONDecodeError):
            json.loads(answer.chunks[-1])
    if at == "before_end":
        assert answer.lines[-1]["done"] is True
    if at != "accept":
        assert node.received[0].outcome == "faulted"
    await healthy(node)


@pytest.mark.parametrize(
    "at", ["before_head", "mid_head", "after_head", "mid_line", "after_chunks", "before_end"]
)
async def test_hang_keeps_silent_until_the_client_leaves(ollama_node: NodeFactory, at: str) -> None:
    node = await ollama_node(num_parallel=2)
    node.fail(faults.hang(at))  # type: ignore[arg-type]
    asked = asyncio.create_task(ask(node.host_port, GENERATE))
    record = (await node.wait_received())[0]
    await node.wait_until(lambda: record.outcome == "faulted" or asked.done())
    await healthy(node)
    assert not asked.done() and record.finished_s is None
    asked.cancel()
    await node.wait_finished(record)
    await node.wait_until(lambda: not node.server.connections)


@pytest.mark.parametrize("at", ["accept", "before_head", "after_chunks"])
async def test_garbage(ollama_node: NodeFactory, at: str) -> None:
    node = await ollama_node()
    node.fail(faults.garbage(at))  # type: ignore[arg-type]
    answer = await ask(node.host_port, GENERATE)
    assert answer.raw.endswith(faults.GARBAGE) and answer.ending == "fin"
    assert (answer.raw == faults.GARBAGE) == (at != "after_chunks")
    await healthy(node)


@pytest.mark.parametrize("name", faults.TEXTS)
async def test_error_texts_keep_their_status(ollama_node: NodeFactory, name: str) -> None:
    node = await ollama_node()
    status, text = faults.TEXTS[name]
    node.fail(faults.named(name, times=3))
    native, openai, anthropic = [await ask(node.host_port, sent) for sent in (GENERATE, OPENAI, ANTHROPIC)]
    assert [a.status for a in (native, openai, anthropic)] == [status] * 3
    assert native.json == {"error": text}
    assert openai.json["error"]["message"] == text and openai.json["error"]["param"] is None
    assert anthropic.json["type"] == "error" and anthropic.json["error"]["message"] == text
    assert node.scheduler.loads == []
    await healthy(node)


@pytest.mark.parametrize("chunks", [0, 2])
async def test_error_mid_stream_in_each_protocol(ollama_node: NodeFactory, chunks: int) -> None:
    node = await ollama_node()
    node.fail(faults.error_line("it broke", chunks=chunks, times=3))
    native = await ask(node.host_port, GENERATE)
    assert native.ending == "complete" and native.status == 200
    assert native.lines[-1] == {"error": "it broke"} and len(native.chunks) == chunks + 1
    openai = await ask(node.host_port, OPENAI)
    assert openai.ending == "complete" and b"[DONE]" not in openai.body
    assert json.loads(openai.chunks[-1].removeprefix(b"data: "))["model"] == ""
    anthropic = await ask(node.host_port, ANTHROPIC)
    assert anthropic.ending == "complete" and b"message_stop" not in anthropic.body
    assert len(anthropic.chunks) == chunks
    await healthy(node)


async def test_clean_end_without_done(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(faults.no_done(times=3))
    native = await ask(node.host_port, GENERATE)
    assert native.ending == "complete" and [line["done"] for line in native.lines] == [False] * 5
    openai = await ask(node.host_port, OPENAI)
    assert openai.ending == "complete" and b"[DONE]" not in openai.body
    anthropic = await ask(node.host_port, ANTHROPIC)
    assert anthropic.ending == "complete" and b"message_stop" not in anthropic.body


async def test_a_whole_answer_is_cut_too(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    for at in ("mid_head", "after_head", "mid_line", "before_end"):
        node.fail(faults.rst(at))
        answer = await ask(node.host_port, WHOLE)
        assert answer.ending == "rst"
        missing = int(answer.headers.get("content-length", 0)) - len(answer.body)
        assert missing == 1 if at == "before_end" else True
    await healthy(node)


@pytest.mark.parametrize(("delta", "sent"), [(10, WHOLE), (-4, WHOLE), (10, GENERATE), (-4, GENERATE)])
async def test_wrong_content_length(ollama_node: NodeFactory, delta: int, sent: bytes) -> None:
    node = await ollama_node()
    node.fail(faults.wrong_length(delta))
    host, port = node.host_port.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    raw = await reader.read()
    head, _, body = raw.partition(b"\r\n\r\n")
    claimed = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    assert claimed - len(body) == delta
    writer.close()


async def test_trickle_delivers_everything(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(faults.trickle(5, 0))
    await healthy(node)
    assert node.faults_left == []


async def test_a_fault_waits_for_its_path_and_counts(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(faults.rst(path="/api/ps", times=2))
    await healthy(node)
    ps = request_bytes("/api/ps")
    assert [(await ask(node.host_port, ps)).ending for _ in range(3)] == ["rst", "rst", "complete"]
    node.fail(faults.reply(500, "no", times=None))
    assert [(await ask(node.host_port, ps)).status for _ in range(3)] == [500] * 3
    node.heal()
    await healthy(node)


async def test_refuse_then_accept_again(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    await node.refuse()
    with pytest.raises(ConnectionRefusedError):
        await ask(node.host_port, GENERATE)
    await node.accept_again()
    await healthy(node)


async def test_black_hole_accepts_and_reads_nothing(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.black_hole()
    asked = asyncio.create_task(ask(node.host_port, GENERATE))
    await node.wait_until(lambda: node.server.accepted == 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(asked)
    assert not node.received
    node.heal()  # reads on
    assert (await asked).status == 200
    await healthy(node)


async def test_slow_accept_answers_in_the_end(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.slow_accept(0.02)
    await healthy(node)


async def test_freeze_and_thaw_mid_stream(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.hold_tokens()
    asked = asyncio.create_task(ask(node.host_port, GENERATE))
    await node.wait_until(lambda: bool(node.scheduler.runners))
    node.freeze()
    node.go_on()
    other = asyncio.create_task(ask(node.host_port, request_bytes("/api/ps")))
    await node.wait_received(1, path="/api/ps")
    assert not other.done()
    node.thaw()
    assert (await other).status == 200
    assert check_stream("".join(line["response"] for line in (await asked).lines), PROMPT) == 5


async def test_kill_resets_everything_and_restart_knows_nothing(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    port = node.host_port
    asked = asyncio.create_task(
        ask(port, request_bytes("/api/generate", {"model": "llama3.2", "prompt": "[[n:9999]]"}))
    )
    await node.wait_until(lambda: any(r.head_sent_s for r in node.received))
    await node.kill()
    assert (await asked).ending == "rst" and node.received[0].outcome == "cancelled"
    with pytest.raises(ConnectionRefusedError):
        await ask(port, GENERATE)
    await node.restart()
    assert node.host_port == port and (await ask(port, request_bytes("/api/ps"))).json == {"models": []}
    await healthy(node)


async def test_cut_in_the_middle_of_an_upload(ollama_node: NodeFactory) -> None:
    node = await ollama_node()
    node.fail(Fault("rst", "mid_body", bytes=70_000))
    digest = "0" * 64
    answer = await ask(node.host_port, request_bytes(f"/api/blobs/sha256:{digest}", b"x" * 200_000, "POST"))
    assert answer.ending == "rst" and answer.raw == b""
    assert 70_000 <= node.received[0].body_bytes <= 200_000
