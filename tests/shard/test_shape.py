"""What a header says a model weighs: layers, experts, caches, windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shard.gguf import GgufError, Header, Tensor, read_header
from shard.shape import (
    LayerShape,
    ModelShape,
    compute_buffer_bytes,
    input_buffer_bytes,
    kv_bytes,
    read_shape,
)
from tests.shard import headers


def shape_of(folder: Path, model: headers.Model) -> ModelShape:
    return read_shape(read_header(headers.write(folder / "m.gguf", model)))


@pytest.mark.parametrize(
    "model", [headers.LLAMA_3_1_8B, headers.GPT_OSS_120B, headers.DEEPSEEK_V2_LITE, headers.MAMBA_2_8B]
)
def test_every_byte_of_the_file_is_in_its_shape(tmp_path: Path, model: headers.Model) -> None:
    header = read_header(headers.write(tmp_path / "m.gguf", model))
    shape = read_shape(header)
    tied = shape.embedding_bytes if model.tied else 0
    in_file = header.size_bytes - header.data_offset_bytes
    # Tensors begin at multiples of 32 bytes.
    assert in_file - 32 * len(header.tensors) <= shape.weight_bytes - tied <= in_file
    assert (shape.architecture, len(shape.layers), shape.vocab) == (
        model.architecture,
        model.layers,
        model.vocab,
    )
    assert (shape.embedding_length, shape.context_length) == (model.width, model.context)


def test_a_token_reads_only_the_experts_that_it_is_routed_to(tmp_path: Path) -> None:
    dense = shape_of(tmp_path, headers.LLAMA_3_1_8B)
    assert all(layer.active_bytes == layer.weight_bytes for layer in dense.layers)
    mixtral = shape_of(tmp_path, headers.MIXTRAL_8X7B)
    expert = 4096 * 14336 * 144 // 256  # one matrix of one expert in Q4_K
    layer = mixtral.layers[4]
    assert layer.weight_bytes - layer.active_bytes == 6 * 3 * expert, "two of eight"
    deepseek = shape_of(tmp_path, headers.DEEPSEEK_V2_LITE)
    assert deepseek.layers[0].active_bytes == deepseek.layers[0].weight_bytes, "its first layer is dense"
    routed = 58 / 64 * 64 * 3 * 2048 * 1408 * 34 / 32
    assert deepseek.layers[1].weight_bytes - deepseek.layers[1].active_bytes == pytest.approx(routed)


def test_windows_come_from_the_file_where_it_has_them(tmp_path: Path) -> None:
    def windows(model: headers.Model, **keys: headers.Value) -> list[int | None]:
        named = {f"attention.{key}": value for key, value in keys.items()}
        shape = shape_of(tmp_path, replace(model, keys=dict(model.keys) | named))
        return [layer.window for layer in shape.layers]

    gemma = windows(headers.GEMMA_3_27B)
    assert gemma[:7] == [1024] * 5 + [None, 1024] and gemma.count(None) == 10
    assert windows(headers.GEMMA_3_27B, sliding_window_pattern=2)[:4] == [1024, None, 1024, None]
    pattern = [False, True, True] + [False] * 59
    assert windows(headers.GEMMA_3_27B, sliding_window_pattern=pattern)[:4] == [None, 1024, 1024, None]
    assert windows(headers.GPT_OSS_120B)[:3] == [128, None, 128]
    assert set(windows(headers.QWEN3_32B, sliding_window=4096)) == {None}, "llama.cpp runs it without"


def test_a_cache_holds_the_context_or_the_window_and_the_batch() -> None:
    whole = LayerShape(weight_bytes=0, active_bytes=0, kv_bytes_per_cell=4096.0)
    window = replace(whole, window=1024)
    assert kv_bytes(whole, 8192) == 8192 * 4096
    assert kv_bytes(whole, 8000, parallel=3) == 3 * 8192 * 4096, "a context is padded to 256 cells"
    assert kv_bytes(window, 8192) == (1024 + 512) * 4096
    assert kv_bytes(window, 8192, num_batch=100) == 1280 * 4096
    assert kv_bytes(window, 512) == 512 * 4096, "never more than the context"
    assert kv_bytes(whole, 8192, k_type="q8_0", v_type="q8_0") == 8192 * 4096 * 17 // 32
    assert kv_bytes(whole, 256, k_type="q4_0") == 256 * (4096 // 2) * (1 + 9 / 32)
    recurrent = replace(whole, kv_bytes_per_cell=0.0, state_bytes=1000)
    assert kv_bytes(recurrent, 8192, parallel=2) == kv_bytes(recurrent, 64, parallel=2) == 2000


def test_layers_without_attention_have_no_cells(tmp_path: Path) -> None:
    lfm2 = shape_of(tmp_path, headers.LFM2_1_2B)
    assert [bool(layer.kv_bytes_per_cell) for layer in lfm2.layers[:4]] == [False, False, True, False]
    assert [layer.state_bytes for layer in lfm2.layers[:3]] == [2048 * 2 * 4, 2048 * 2 * 4, 0]
    assert lfm2.upper_bound and "recurrent" in lfm2.upper_bound
    unused = shape_of(
        tmp_path,
        replace(
            headers.GEMMA_3_27B, keys=dict(headers.GEMMA_3_27B.keys) | {"attention.shared_kv_layers": 60}
        ),
    )
    assert [bool(layer.kv_bytes_per_cell) for layer in unused.layers[:4]] == [True, True, False, False]


def test_a_figure_that_is_only_a_bound_says_so(tmp_path: Path) -> None:
    assert shape_of(tmp_path, headers.LLAMA_3_1_8B).upper_bound is None
    exact = shape_of(tmp_path, headers.DEEPSEEK_V2_LITE)
    assert exact.upper_bound is None
    assert exact.layers[0].kv_bytes_per_cell == 576 * 2
    unknown = replace(headers.DEEPSEEK_V2_LITE, architecture="deepseek32")
    bound = shape_of(tmp_path, unknown)
    assert bound.upper_bound and "latent" in bound.upper_bound
    assert bound.layers[0].kv_bytes_per_cell == (576 + 512) * 2
    for model in (headers.MAMBA_2_8B, headers.QWEN3_NEXT_80B):
        assert shape_of(tmp_path, model).upper_bound


def test_scratch_grows_with_the_batch_and_not_beyond_the_context(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, headers.LLAMA_3_1_8B)
    assert compute_buffer_bytes(shape, 8192, 128) < compute_buffer_bytes(shape, 8192, 512)
    assert compute_buffer_bytes(shape, 512, 4096) == compute_buffer_bytes(shape, 512, 512)
    assert compute_buffer_bytes(shape, 8192, output=True) == compute_buffer_bytes(shape, 8192)
    with_logits = compute_buffer_bytes(shape, 8192, output=True, embeddings=True)
    assert with_logits > 512 * 128256 * 4
    assert compute_buffer_bytes(shape, 8192, flash_attention=False) > 32 * 8192 * 512 * 4
    assert input_buffer_bytes(shape, 8192) < compute_buffer_bytes(shape, 8192)


def test_a_type_that_is_not_known_is_one_clear_error() -> None:
    tensor = Tensor("token_embd.weight", (32, 2), 999, 0)
    header = Header(Path("m.gguf"), 0, {"general.architecture": "llama"}, (tensor,))
    with pytest.raises(GgufError, match=r"m\.gguf: tensor token_embd\.weight has the unknown type 999"):
        read_shape(header)
