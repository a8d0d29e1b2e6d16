"""What is asked of nodes to know what models are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from proxy_addon.ask import ReloadKey
from proxy_addon.fleet.shapes import options_of
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


async def test_what_a_modelfile_sets_of_a_runner_is_known(
    ollama_node: NodeFactory, watched: WatchFactory
) -> None:
    parameters = {"stop": ["<|end|>", "num_ctx 1"], "temperature": 0.7, "num_ctx": 1 << 20, "use_mmap": False}
    plain, own = FakeModel("plain"), FakeModel("own", parameters=parameters)
    found = watched(await ollama_node([plain, own]))
    await until(lambda: len(found.fleet.shapes) == 2)
    assert found.fleet.modelfiles == {own.digest: (("num_ctx", 1 << 20), ("use_mmap", False))}


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ("num_ctx                        8192", (("num_ctx", 8192),)),
        ("num_ctx 4096\r\nnum_ctx 8192\n", (("num_ctx", 8192),)),
        ('num_ctx "8192"\nmain_gpu\t1', (("num_ctx", 8192),)),
        (
            "num_gpu 20\nnum_thread 4\nnum_batch 1.024e+03",
            (("num_batch", 1024), ("num_gpu", 20), ("num_thread", 4)),
        ),
        ("num_gpu -1\nnum_thread 0\nmain_gpu 0", ()),
        ("num_ctx\nnum_ctx many\nuse_mmap 1\nnum_batch inf\nnum_batch nan\n\n", ()),
        ('stop "num_ctx 1"\ntemperature 1', ()),
        (None, ()),
        (["num_ctx 8192"], ()),
    ],
)
def test_parameters_are_read_whatever_stands_in_them(parameters: Any, options: ReloadKey) -> None:
    assert options_of(parameters) == options
