"""What is asked of nodes to know what models are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.fakes.fixtures import NodeFactory
from tests.fakes.store import FakeModel
from tests.proxy.fleet.conftest import WatchFactory, until


@dataclass(frozen=True)
class Hybrid(FakeModel):
    """A model whose layers differ."""

    def model_info(self, verbose: bool = False) -> dict[str, Any]:
        lists: dict[str, Any] = {
            "llama.attention.head_count_kv": [8, 0] * 14,
            "tokenizer.ggml.tokens": ["a"] * 5000,
            "llama.attention.sliding_window_pattern": ["no layer"] * 5000,
        }
        return super().model_info(verbose) | (lists if verbose else dict.fromkeys(lists))


async def test_lists_are_asked_for_only_where_they_are_needed_and_only_small_ones_are_kept(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    plain, hybrid = FakeModel("plain"), Hybrid("hybrid")
    fake = await ollama_node([plain, hybrid])
    found = watched(fake)
    shapes = found.fleet.shapes
    await until(lambda: len(fake.requests("/api/show")) == 3 and len(shapes) == 2)
    await until(lambda: shapes[hybrid.digest]["llama.attention.head_count_kv"] == [8, 0] * 14)
    assert shapes[hybrid.digest]["tokenizer.ggml.tokens"] is None
    assert shapes[hybrid.digest]["llama.attention.sliding_window_pattern"] is None
    asked = [r.json for r in fake.requests("/api/show")]
    assert sorted((each["model"], each.get("verbose", False)) for each in asked) == [
        ("hybrid:latest", False),
        ("hybrid:latest", True),
        ("plain:latest", False),
    ]
