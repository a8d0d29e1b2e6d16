"""What a coordinator's report promises of a model, which is what proxies place by."""

from __future__ import annotations

from typing import Any

from tests.shard.conftest import BOUND_S, ShardNode, StartNode, wait_until

MIB = 1 << 20


def promised(start_node: StartNode, memory_mib: int) -> tuple[ShardNode, dict[str, Any]]:
    # An agent that answers nowhere: it is a coordinator, with this machine's memory alone.
    node = start_node("--no-mdns", "--agents", "127.0.0.1:1", "--memory", f"{memory_mib}MiB")
    models = wait_until(
        lambda: node.http.get("/v1/report", timeout=BOUND_S).json()["shard"]["models"], "expectations"
    )
    return node, models[0]


def test_a_model_that_fits_says_up_to_which_context(start_node: StartNode) -> None:
    node, model = promised(start_node, 520)
    largest = model["largest_num_ctx"]
    assert model["fits"] and 4096 < largest < 32768
    # It keeps the promise, and promises no less than it could.
    load = {"model": node.model, "stream": False}
    assert node.http.post("/api/generate", json=load | {"options": {"num_ctx": largest}}).status_code == 200
    refused = node.http.post("/api/generate", json=load | {"options": {"num_ctx": largest + 512}})
    assert "requires more system memory" in refused.json()["error"]
    node.stop()


def test_a_model_that_fits_at_any_context_says_its_own(start_node: StartNode) -> None:
    node, model = promised(start_node, 4096)
    assert model["fits"] and model["largest_num_ctx"] == 32768
    node.stop()


def test_it_says_how_many_requests_a_model_serves_at_a_time(start_node: StartNode) -> None:
    node = start_node("--no-mdns", "--agents", "127.0.0.1:1", "--parallel", "3")
    assert node.http.get("/v1/report", timeout=BOUND_S).json()["ollama"]["num_parallel"] == 3
    node.stop()
