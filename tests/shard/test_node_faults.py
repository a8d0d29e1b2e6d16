"""What clients see when a process dies or a client leaves; nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import ollama
import openai
import psutil
import pytest

from tests.shard.conftest import BOUND_S, ShardNode, StartNode, options, wait_until

# "1, 2, 3," goes on for as long as it is let.
ENDLESS = {"prompt": "1, 2, 3,", "raw": True, "options": options(num_predict=3000)}


def endless(node: ShardNode, **more: object) -> dict[str, object]:
    return {"model": node.model} | ENDLESS | more


def test_a_client_that_leaves_its_stream_frees_the_slot(node: ShardNode) -> None:
    with node.http.stream("POST", "/api/generate", json=endless(node)) as stream:
        lines = stream.iter_lines()
        assert json.loads(next(lines))["response"] and json.loads(next(lines))["response"]
        assert node.generating()
    wait_until(lambda: not node.generating(), "llama-server stops generating")
    assert node.client.generate(node.model, "a", raw=True, options=options(num_predict=1)).done


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_frees_the_slot(node: ShardNode) -> None:
    client = httpx.Client(base_url=node.url, trust_env=False)
    request = client.build_request("POST", "/api/generate", json=endless(node, stream=False), timeout=1.0)
    with pytest.raises(httpx.ReadTimeout):
        client.send(request)
    client.close()
    wait_until(lambda: not node.generating(), "llama-server stops generating")
    assert node.client.generate(node.model, "a", raw=True, options=options(num_predict=1)).done


def test_a_client_that_leaves_the_queue_is_forgotten(node: ShardNode) -> None:
    with node.http.stream("POST", "/api/generate", json=endless(node)) as first:
        lines = first.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{node.url}/api/generate", json=endless(node), timeout=0.5, trust_env=False)
        assert json.loads(next(lines))["response"], "the running answer goes on"
    wait_until(lambda: not node.generating(), "no answer runs for the one who left")


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_a_llama_server_killed_in_mid_stream_ends_the_stream_with_an_error(
    node: ShardNode, path: str
) -> None:
    node.load()
    [child] = node.llama_servers()
    body = endless(node, messages=[{"role": "user", "content": "1, 2, 3,"}])
    with node.http.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        first = json.loads(next(lines))
        child.kill()
        rest = [json.loads(line) for line in lines]
    assert not first["done"]
    assert not any(line.get("done") for line in rest)
    assert "llama-server process has terminated: signal: killed" in rest[-1]["error"]
    assert [line for line in rest if "error" in line] == rest[-1:]

    answer = node.client.generate(node.model, "1, 2, 3,", raw=True, options=options(num_predict=3))
    assert answer.response == " 4,"
    assert node.llama_servers()[0].pid != child.pid


def test_an_openai_stream_that_is_cut_raises_in_the_client(node: ShardNode) -> None:
    node.load()
    gpt = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=BOUND_S)
    stream = gpt.completions.create(
        model=node.model, prompt="1, 2, 3,", max_tokens=3000, temperature=0, stream=True
    )
    next(iter(stream))
    node.llama_servers()[0].kill()
    with pytest.raises(openai.APIError, match="llama-server process has terminated"):
        list(stream)


def test_a_llama_server_that_dies_while_idle_is_noticed_and_replaced(node: ShardNode) -> None:
    node.load()
    [child] = node.llama_servers()
    child.kill()
    wait_until(lambda: node.client.ps().models == [], "ps no longer lists the model")
    assert node.client.generate(node.model, "1, 2, 3,", raw=True, options=options(num_predict=3)).done


def test_sigterm_lets_a_short_answer_end_and_takes_the_children_along(start_node: StartNode) -> None:
    node = start_node()
    node.load()
    children = node.llama_servers()
    body = endless(node, options=options(num_predict=20))
    with node.http.stream("POST", "/api/generate", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        node.process.send_signal(signal.SIGTERM)
        last = [json.loads(line) for line in lines][-1]
    assert (last["done"], last["eval_count"]) == (True, 20)
    assert node.stop() == 0
    assert not any(child.is_running() for child in children)


def test_no_llama_server_outlives_a_killed_node(start_node: StartNode) -> None:
    node = start_node()
    node.load()
    children = node.llama_servers()
    assert len(children) == 1
    node.process.kill()
    _, alive = psutil.wait_procs(children, timeout=BOUND_S)
    assert alive == []


def script(path: Path, text: str) -> dict[str, str]:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return {"SOLLOL_LLAMA_SERVER": str(path)}


def test_a_binary_made_for_another_cpu_gives_way_to_the_next(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node(env=script(tmp_path / "llama-server", "kill -ILL $$"))
    node.load()
    assert node.llama_servers()[0].cmdline()[0] != str(tmp_path / "llama-server")


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "echo 'error: unknown model architecture' >&2; exit 1": (
            "llama-server process has terminated: exit status 1: error: unknown model architecture"
        ),
        "echo 'ggml_backend: failed to allocate buffer' >&2; exit 1": (
            "llama-server reported out-of-memory during startup: ggml_backend: failed to allocate buffer"
        ),
    }.items(),
)
def test_a_load_that_fails_says_why_in_ollamas_words(
    start_node: StartNode, tmp_path: Path, text: str, expected: str
) -> None:
    node = start_node(env=script(tmp_path / "llama-server", text))
    for _ in range(2):  # and again: a failed load is not remembered
        with pytest.raises(ollama.ResponseError) as failure:
            node.client.generate(node.model, "a")
        assert (failure.value.status_code, failure.value.error) == (500, expected)
    assert node.client.ps().models == []
    node.stop()


def test_a_load_that_nobody_waits_for_is_abandoned(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node(env=script(tmp_path / "llama-server", "exec sleep 1000"))
    client = httpx.Client(base_url=node.url, trust_env=False)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/api/generate", json={"model": node.model}, timeout=1.0)
    client.close()
    wait_until(lambda: not node.llama_servers(), "the loading process is ended")
    assert node.client.ps().models == []
    node.stop()


def test_wrong_arguments_end_in_one_sentence(start_node: StartNode, tmp_path: Path) -> None:
    import subprocess
    import sys

    def fail(*flags: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "shard", "serve", "--state-dir", str(tmp_path), *flags],
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            env=os.environ | {"NO_COLOR": "1", "TERM": "dumb"},
        )
        assert run.returncode != 0
        return run.stderr

    bogus = tmp_path / "bogus.gguf"
    bogus.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert fail("--model", f"a={bogus}") == f"sollol shard: {bogus} is not a complete GGUF file\n"
    assert "No such file" in fail("--model", f"a={tmp_path / 'none.gguf'}")
    assert "is not NAME=GGUF_PATH" in fail("--model", "a")
    for nowhere in ("nowhere", ":1", "127.0.0.1:70000"):
        assert "is not HOST:PORT" in fail("--listen", nowhere)
    assert "'lots' is no size, such as 20GiB" in fail("--memory", "lots")
    taken = start_node().url.removeprefix("http://")
    assert fail("--listen", taken) == f"sollol shard: cannot serve on {taken}: Address already in use\n"
