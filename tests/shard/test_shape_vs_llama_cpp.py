"""Our bytes per device against what llama.cpp prints for the same file, split and context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shard.gguf import read_header
from shard.shape import ModelShape, compute_buffer_bytes, input_buffer_bytes, kv_bytes, read_shape
from tests.shard import headers
from tests.shard.projection import Projected, project, rpc_servers

MIB = 1 << 20

MODELS = {
    "Llama 3.2 1B": headers.LLAMA_3_2_1B,
    "Llama 3.1 8B": headers.LLAMA_3_1_8B,
    "Llama 3.3 70B": headers.LLAMA_3_3_70B,
    "Qwen2.5 32B": headers.QWEN2_5_32B,
    "Qwen3 32B": headers.QWEN3_32B,
    "Mixtral 8x7B": headers.MIXTRAL_8X7B,
    "Qwen3 30B-A3B": headers.QWEN3_30B_A3B,
    "gpt-oss 120B": headers.GPT_OSS_120B,
    "Llama 4 Scout": headers.LLAMA_4_SCOUT,
    "Gemma 2 27B": headers.GEMMA_2_27B,
    "Gemma 3 27B": headers.GEMMA_3_27B,
    "Command R7B": headers.COMMAND_R7B,
    "OLMo 3 32B": headers.OLMO_3_32B,
    "DeepSeek V2 Lite": headers.DEEPSEEK_V2_LITE,
    "Mamba 2.8B": headers.MAMBA_2_8B,
    "LFM2 1.2B": headers.LFM2_1_2B,
    "Qwen3 Next 80B": headers.QWEN3_NEXT_80B,
}


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    """Three rpc-servers that stay empty."""
    with rpc_servers(3) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sparse files lie."""
    return tmp_path_factory.mktemp("headers")


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The file of one model."""
    return headers.write(folder / f"{request.param}.gguf", MODELS[request.param])


def check(
    shape: ModelShape,
    printed: dict[str, Projected],
    split: tuple[int, ...],
    num_ctx: int,
    num_batch: int,
    parallel: int = 1,
    cache: str = "f16",
    *,
    embeddings: bool = False,
    flash_attention: bool = True,
) -> None:
    """Hold every device's row against the shape; the split counts the output layer to its last device."""
    first = 0
    for index, count in enumerate(split):
        layers = shape.layers[first : first + count]
        first += count
        output = index == len(split) - 1
        weights = sum(layer.weight_bytes for layer in layers) + output * shape.output_bytes
        cells = sum(kv_bytes(layer, num_ctx, parallel, num_batch, cache, cache) for layer in layers)
        scratch = compute_buffer_bytes(
            shape, num_ctx, num_batch, output=output, embeddings=embeddings, flash_attention=flash_attention
        )
        row = printed[f"RPC{index}"]
        assert weights // MIB == pytest.approx(row.model_mib, abs=1), f"weights of device {index}"
        assert cells // MIB == pytest.approx(row.context_mib, abs=1), f"context of device {index}"
        assert row.compute_mib * MIB <= scratch, f"scratch of device {index}"
        assert scratch <= 2 * row.compute_mib * MIB + 32 * MIB, f"scratch of device {index}"
    assert shape.embedding_bytes // MIB == pytest.approx(printed["Host"].model_mib, abs=1)
    host = input_buffer_bytes(shape, num_ctx, num_batch, flash_attention=flash_attention)
    assert printed["Host"].compute_mib * MIB <= host <= 2 * printed["Host"].compute_mib * MIB + 32 * MIB


def test_two_devices(model: Path, endpoints: list[str]) -> None:
    shape = read_shape(read_header(model))
    layers = len(shape.layers)
    split = (2 * layers // 3, layers + 1 - 2 * layers // 3)
    check(shape, project(model, endpoints[:2], split, 8192, 512, "-np", "1"), split, 8192, 512)


def test_several_sequences_a_small_batch_and_a_quantised_cache(model: Path, endpoints: list[str]) -> None:
    shape = read_shape(read_header(model))
    layers = len(shape.layers)
    split = (layers // 4, layers // 4, layers + 1 - 2 * (layers // 4))
    flags = ("-np", "2", "-ctk", "q8_0", "-ctv", "q8_0")
    printed = project(model, endpoints, split, 2 * 12000, 128, *flags)
    check(shape, printed, split, 12000, 128, 2, "q8_0")


def test_logits_for_every_token_and_no_flash_attention(model: Path, endpoints: list[str]) -> None:
    shape = read_shape(read_header(model))
    layers = len(shape.layers)
    split = (layers // 2, layers + 1 - layers // 2)
    embedding = project(
        model, endpoints[:2], split, 8192, 512, "-np", "1", "--embeddings", "--pooling", "last"
    )
    check(shape, embedding, split, 8192, 512, embeddings=True)
    slow = project(model, endpoints[:2], split, 8192, 512, "-np", "1", "-fa", "off")
    check(shape, slow, split, 8192, 512, flash_attention=False)


def test_a_draft_layer_has_its_place_in_the_split(folder: Path, endpoints: list[str]) -> None:
    path = headers.write(folder / "glm.gguf", headers.GLM_4_5_AIR)
    shape = read_shape(read_header(path))
    split = (31, 17)
    printed = project(path, endpoints[:2], split, 8192, 512, "-np", "1")
    weights = [sum(layer.weight_bytes for layer in part) for part in (shape.layers[:31], shape.layers[31:])]
    cells = [sum(kv_bytes(layer, 8192) for layer in part) for part in (shape.layers[:31], shape.layers[31:])]
    assert [cell // MIB for cell in cells] == [printed[f"RPC{index}"].context_mib for index in (0, 1)]
    assert weights[0] // MIB == printed["RPC0"].model_mib
    unloaded = weights[1] + shape.output_bytes - shape.layers[-1].weight_bytes
    assert unloaded // MIB == pytest.approx(printed["RPC1"].model_mib, abs=1), "held, but not loaded"
    assert shape.layers[-1].active_bytes == 0 < shape.layers[-2].active_bytes
