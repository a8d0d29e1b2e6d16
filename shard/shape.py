"""What a model weighs, layer by layer: weights, KV cache and recurrent state, read from its header.

Nothing is guessed from names or parameter counts: every byte is a tensor's, and every KV cell follows the
keys that llama.cpp itself reads (its `src/llama-hparams.cpp` and `src/models/*.cpp`, build b10434).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shard.gguf import GgufError, Header, Tensor

# llama.cpp pads a context to this many cells (GGML_PAD(n_ctx, 256), src/llama-context.cpp).
CELL_PADDING = 256
_F16_BYTES, _F32_BYTES = 2, 4

# Positions, indices and the like that every graph has beside what grows with the model.
_GRAPH_BYTES = 1 << 20

# Cache type → bytes a value, blocks' scales included (ggml.h, block_q8_0 and its like).
CACHE_VALUE_BYTES: Mapping[str, float] = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0,
    "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One repeating layer (``blk.i``)."""

    weight_bytes: int
    #: What one token reads of the weights: all but the experts that it is not routed to.
    active_bytes: float
    #: K and V of one cell, at f16.
    kv_bytes_per_cell: float
    #: Tokens that the layer looks back; None for the whole context.
    window: int | None = None
    #: Recurrent state of one sequence, whatever the context.
    state_bytes: int = 0
    #: K's part of ``kv_bytes_per_cell``.
    k_share: float = 0.5


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as a planner sees it."""

    architecture: str
    layers: tuple[LayerShape, ...]
    #: The input embedding, which stays on the coordinator's CPU.
    embedding_bytes: int
    #: The output layer; a tied token embedding counts here once more.
    output_bytes: int
    vocab: int
    embedding_length: int
    context_length: int
    #: Why the KV figures are only a bound; None where they are exact.
    upper_bound: str | None = None
    #: Floats that a device keeps of each token of a batch while it computes a layer.
    activation_values: int = 0
    #: Query heads; without flash attention each has its own row of scores.
    heads: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights, a tied embedding counted for both its places."""
        return self.embedding_bytes + self.output_bytes + sum(layer.weight_bytes for layer in self.layers)


def read_shape(header: Header) -> ModelShape:
    """Return the shape of the model that ``header`` describes."""
    return _Reader(header).shape()


def kv_bytes(
    layer: LayerShape,
    num_ctx: int,
    parallel: int = 1,
    num_batch: int = 512,
    k_type: str = "f16",
    v_type: str = "f16",
) -> int:
    """Return what ``layer`` holds for ``parallel`` sequences of ``num_ctx`` tokens, recurrent state included.

    Each sequence has its own cells (llama-server without ``--kv-unified``). A layer with a sliding window
    keeps the window and the batch that is being written (src/llama-kv-cache-iswa.cpp).
    """
    cells = _padded(num_ctx)
    if layer.window is not None:
        cells = _padded(min(cells, layer.window + min(num_batch, num_ctx)))
    k_values = layer.kv_bytes_per_cell * layer.k_share / _F16_BYTES
    v_values = layer.kv_bytes_per_cell * (1 - layer.k_share) / _F16_BYTES
    cell_bytes = k_values * CACHE_VALUE_BYTES[k_type] + v_values * CACHE_VALUE_BYTES[v_type]
    return round(parallel * (cells * cell_bytes + layer.state_bytes))


def compute_buffer_bytes(
    shape: ModelShape,
    num_ctx: int,
    num_batch: int = 512,
    *,
    output: bool = False,
    embeddings: bool = False,
    flash_attention: bool = True,
) -> int:
    """Return an upper estimate of the scratch memory of a device that holds layers of ``shape``.

    ``output`` is for the device that holds the output layer too: only where llama-server was started with
    ``--embeddings`` does it compute logits for every token of a batch, else for one a sequence. How many
    sequences there are does not matter, they share the batch. Held against build b10434 for many models in
    tests/shard/test_shape_vs_llama_cpp.py: never too little, mostly a tenth too much, at most 2.2 times.
    """
    batch = min(num_batch, num_ctx)
    a_token = _F32_BYTES * shape.activation_values + _mask_bytes(shape, num_ctx, batch)
    if not flash_attention:
        # One score for each head and cell, and the mask in F32.
        a_token = _F32_BYTES * (shape.activation_values + (shape.heads + 1) * _padded(num_ctx))
        a_token += _mask_bytes(shape, num_ctx, batch)
    if output and embeddings:
        logits = _F32_BYTES * (shape.vocab + 3 * shape.embedding_length)
        a_token = max(a_token, logits + _mask_bytes(shape, num_ctx, batch))
    return batch * a_token + _GRAPH_BYTES


def input_buffer_bytes(
    shape: ModelShape, num_ctx: int, num_batch: int = 512, *, flash_attention: bool = True
) -> int:
    """Return the coordinator's own scratch memory: the embedded batch and its masks, whoever computes."""
    batch = min(num_batch, num_ctx)
    masks = _mask_bytes(shape, num_ctx, batch) * (1 if flash_attention else 4)
    a_token = 2 * _F32_BYTES * shape.embedding_length + masks
    return batch * a_token + _GRAPH_BYTES


def _mask_bytes(shape: ModelShape, num_ctx: int, batch: int) -> int:
    """Return a token's rows of the attention masks (F16): one for the whole context, one for the window."""
    windows = {layer.window for layer in shape.layers if layer.window is not None}
    cells = [_padded(num_ctx), *(_padded(min(_padded(num_ctx), window + batch)) for window in windows)]
    return _F16_BYTES * sum(cells)


def _padded(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING


@dataclass(frozen=True, slots=True)
class _Windows:
    """Which layers slide: all but one in every ``period``; ``size`` where the file names no window."""

    period: int = 0
    dense_first: bool = False
    size: int = 0


# Architectures whose windows llama.cpp honours; others (phi3, Mistral's) it runs over the whole context.
_WINDOWED: Mapping[str, _Windows] = {
    "gemma2": _Windows(2, size=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(),
    "gpt-oss": _Windows(2),
    "cohere2": _Windows(4),
    "olmo2": _Windows(4),
    "llama4": _Windows(4, size=8192),
    "smallthinker": _Windows(4, dense_first=True, size=4096),
    "exaone4": _Windows(4),
    "exaone-moe": _Windows(4),
    "afmoe": _Windows(4),
    "plamo3": _Windows(),
    "mimo2": _Windows(),
    "step35": _Windows(),
}

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors of the input side; everything else outside of the blocks goes with the output layer.
_INPUT = ("token_embd", "token_types", "position_embd", "per_layer_token_embd")
_RECURRENT = ("ssm_", "shortconv.", "time_mix_")
_ATTENTION = ("attn_output", "attn_k.", "attn_kv")

_RECURRENT_BOUND = "its recurrent state is counted for every layer that may hold one"
_MLA_BOUND = "its latent attention is counted as if it kept keys and values apart"
# Whose latent attention llama.cpp keeps as one tensor a layer, with nothing beside it.
_LATENT_ONLY = ("deepseek2", "deepseek2-ocr")


class _Reader:
    def __init__(self, header: Header) -> None:
        from gguf import GGML_QUANT_SIZES  # imports numpy: 0.7 s, once

        self.header = header
        self.block_sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        self.blocks: list[list[tuple[str, Tensor]]] = [[] for _ in range(self.integer("block_count"))]
        self.outside: list[Tensor] = []
        for tensor in header.tensors:
            match = _BLOCK.fullmatch(tensor.name)
            if match and int(match[1]) < len(self.blocks):
                self.blocks[int(match[1])].append((match[2], tensor))
            else:
                self.outside.append(tensor)

    def value(self, key: str) -> Any:
        return self.header.of_architecture(key)

    def integer(self, key: str, otherwise: int = 0) -> int:
        value = self.value(key)
        return value if isinstance(value, int) else otherwise

    def of_layer(self, key: str, index: int, otherwise: int = 0) -> int:
        """Return a key that is one number for all layers or an array of one a layer."""
        value = self.value(key)
        if isinstance(value, list):
            return int(value[index]) if index < len(value) else otherwise
        return int(value) if isinstance(value, int) else otherwise

    def bytes_of(self, tensor: Tensor) -> int:
        if tensor.ggml_type not in self.block_sizes:
            raise GgufError(
                f"{self.header.path}: tensor {tensor.name} has the unknown type {tensor.ggml_type}"
            )
        block, size = self.block_sizes[tensor.ggml_type]
        return tensor.elements // block * size

    def shape(self) -> ModelShape:
        header = self.header
        token_embedding = next((t for t in self.outside if t.name == "token_embd.weight"), None)
        inputs = [t for t in self.outside if t.name.startswith(_INPUT)]
        output_bytes = sum(self.bytes_of(t) for t in self.outside if not t.name.startswith(_INPUT))
        if token_embedding and not any(t.name == "output.weight" for t in self.outside):
            output_bytes += self.bytes_of(token_embedding)
        layers = tuple(self.layer(index) for index in range(len(self.blocks)))
        return ModelShape(
            architecture=header.architecture,
            layers=layers,
            embedding_bytes=sum(map(self.bytes_of, inputs)),
            output_bytes=output_bytes,
            vocab=token_embedding.shape[-1] if token_embedding else 0,
            embedding_length=header.embedding_length or 0,
            context_length=header.context_length or 0,
            upper_bound=self.bound(layers),
            activation_values=self.activation_values(),
            heads=max((self.of_layer("attention.head_count", i) for i in range(len(layers))), default=0),
        )

    def activation_values(self) -> int:
        """Return the most floats of one token that live at once in a layer.

        A feed-forward block holds its gate, its up and their product (of every expert that it is routed to,
        with their outputs) beside the residual, its norm, the attention's output and its queries.
        """
        width, used = self.integer("embedding_length"), self.integer("expert_used_count")
        layers = range(len(self.blocks))
        heads = max((self.of_layer("attention.head_count", index) for index in layers), default=0)
        queries = heads * self.integer("attention.key_length", width // max(heads, 1))
        dense = 3 * max((self.of_layer("feed_forward_length", index) for index in layers), default=0)
        if used and not self.integer("leading_dense_block_count"):
            dense = 0
        expert_length = self.integer("expert_feed_forward_length") or self.integer("feed_forward_length")
        routed = used * (3 * expert_length + width)
        recurrent = 6 * self.integer("ssm.inner_size")
        return max(dense, routed, recurrent) + 3 * width + max(width, queries)

    def bound(self, layers: tuple[LayerShape, ...]) -> str | None:
        if any(layer.state_bytes for layer in layers):
            return _RECURRENT_BOUND
        latent = self.value("attention.kv_lora_rank") and self.header.architecture not in _LATENT_ONLY
        return _MLA_BOUND if latent else None

    def layer(self, index: int) -> LayerShape:
        tensors = self.blocks[index]
        weight_bytes = sum(self.bytes_of(tensor) for _, tensor in tensors)
        expert_bytes = sum(self.bytes_of(tensor) for name, tensor in tensors if "_exps." in name)
        experts = self.integer("expert_count")
        idle = 1 - self.integer("expert_used_count", experts) / experts if experts else 0.0
        active_bytes = weight_bytes - idle * expert_bytes
        if index >= len(self.blocks) - self.integer("nextn_predict_layers"):
            # A draft's layer: it has its place in the split and a cache, but no token goes through it. Some
            # architectures do not even load its weights (glm4moe), which is not held to be sure.
            active_bytes = 0.0
        k_values, v_values = self.kv_values(index)
        values = k_values + v_values
        return LayerShape(
            weight_bytes=weight_bytes,
            active_bytes=active_bytes,
            kv_bytes_per_cell=float(_F16_BYTES * values),
            window=self.window(index),
            state_bytes=self.state_bytes(index),
            k_share=k_values / values if values else 0.5,
        )

    def holds(self, index: int, prefixes: tuple[str, ...]) -> bool:
        return any(name.startswith(prefixes) for name, _ in self.blocks[index])

    def kv_values(self, index: int) -> tuple[int, int]:
        """Return how many values of K and of V a cell of layer ``index`` has."""
        shared = self.integer("attention.shared_kv_layers")
        if self.header.architecture == "gemma3n":
            shared = len(self.blocks) - 20  # src/models/gemma3n.cpp: only the first 20 layers have KV
        if index >= len(self.blocks) - max(shared, 0):
            return 0, 0
        if self.holds(index, _RECURRENT) and not self.holds(index, _ATTENTION):
            return 0, 0
        heads = max(self.of_layer("attention.head_count", index), 1)
        kv_heads = self.of_layer("attention.head_count_kv", index, heads)
        default = self.integer("embedding_length") // heads
        swa = "_swa" if self.window(index) is not None and self.value("attention.key_length_swa") else ""
        k_length = self.integer(f"attention.key_length{swa}", default)
        v_length = self.integer(f"attention.value_length{swa}", default)
        if self.header.architecture in _LATENT_ONLY and self.value("attention.key_length_mla"):
            v_length = 0  # a view of K (llama_hparams::is_mla)
        return kv_heads * k_length, kv_heads * v_length

    def window(self, index: int) -> int | None:
        windows = _WINDOWED.get(self.header.architecture)
        if windows is None:
            return None
        size = self.integer("attention.sliding_window", windows.size)
        pattern = self.value("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            slides = index < len(pattern) and bool(pattern[index])
        else:
            period = pattern if isinstance(pattern, int) else windows.period
            slides = period > 0 and index % period != (0 if windows.dense_first else period - 1)
        return size if size > 0 and slides else None

    def state_bytes(self, index: int) -> int:
        """Return the recurrent state of a sequence in layer ``index`` (llama_hparams::n_embd_r, n_embd_s)."""
        if not self.holds(index, _RECURRENT):
            return 0
        width, inner = self.integer("embedding_length"), self.integer("ssm.inner_size")
        state, convolution = self.integer("ssm.state_size"), self.integer("ssm.conv_kernel")
        if head := self.integer("wkv.head_size"):
            values = width * self.integer("token_shift_count", 2) + width * head
        elif kernel := self.integer("shortconv.l_cache"):
            values = width * (kernel - 1)
        elif head := self.integer("kda.head_dim"):
            inner = head * self.of_layer("attention.head_count", index)
            values = 3 * max(convolution - 1, 0) * inner + inner * head
        else:
            groups = self.integer("ssm.group_count")
            values = max(convolution - 1, 0) * (inner + 2 * groups * state) + state * inner
        return _F32_BYTES * values
