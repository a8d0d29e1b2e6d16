"""GGUF files of models far larger than the machine: true headers, and a data part that takes no disk.

Tensor lists, names, shapes and types are those of the published files (the K-quant mixes as llama.cpp's
``llama-quantize`` chooses them); the weights are a hole in the file. The tokenizer is ``no_vocab``, so that
llama.cpp takes the vocabulary's size from a key and reads no list of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import gguf
import numpy
from gguf import GGMLQuantizationType as Type

ALIGNMENT_BYTES = gguf.GGUF_DEFAULT_ALIGNMENT

#: Tensor name → its dimensions, the fastest first as ggml has them.
Dimensions = dict[str, tuple[int, ...]]
Value = bool | int | float | list[int] | list[bool]


@dataclass(frozen=True)
class Model:
    """A published model: what its header says."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    feed_forward: int
    block: Callable[[Model, int], Dimensions]
    keys: Mapping[str, Value] = field(default_factory=dict)
    tied: bool = False
    context: int = 131072
    outside: Dimensions = field(default_factory=dict)
    output_norm: str = "output_norm.weight"
    #: Which type a weight matrix has; vectors are always F32.
    types: Callable[[Model, str, int], Type] = lambda model, name, layer: Type.Q4_K

    def tensors(self) -> Dimensions:
        """Return every tensor of the file, in its order."""
        named: Dimensions = {"token_embd.weight": (self.width, self.vocab)} | self.outside
        for layer in range(self.layers):
            named |= {f"blk.{layer}.{name}": shape for name, shape in self.block(self, layer).items()}
        named[self.output_norm] = (self.width,)
        if not self.tied:
            named["output.weight"] = (self.width, self.vocab)
        return named

    def type_of(self, name: str, shape: tuple[int, ...]) -> Type:
        """Return the type of a tensor: matrices are quantised, vectors and routers are not."""
        plain = (
            ".bias",
            "ffn_gate_inp.weight",
            "ssm_a",
            "ssm_d",
            "ssm_conv1d.weight",
            "shortconv.conv.weight",
        )
        if len(shape) == 1 or name.endswith(plain):
            return Type.F32
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        kind = self.types(self, name, layer)
        return kind if shape[0] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def write(
    path: Path,
    model: Model,
    *,
    without: Collection[str] = (),
    beside: Mapping[str, Value | str] | None = None,
    tokens: int = 0,
) -> Path:
    """Write ``model`` to ``path``; the file has its true length and holds only the header's bytes.

    ``without`` names keys of the architecture to leave out, ``beside`` has keys to add as they stand.
    With ``tokens`` the file gets a tokenizer of that many made-up words.
    """
    writer = gguf.GGUFWriter(path, model.architecture)
    prefix = model.architecture
    for key, value in _common_keys(model).items():
        if key not in without:
            _add(writer, f"{prefix}.{key}", value)
    for key, extra in (beside or {}).items():
        _add(writer, key, extra)
    if tokens:
        _add_tokenizer(writer, tokens)
    else:
        writer.add_tokenizer_model("no_vocab")
    length = 0
    for name, shape in model.tensors().items():
        kind = model.type_of(name, shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape[::-1], numpy.dtype(numpy.float32), nbytes, raw_dtype=kind)
        length += gguf.GGUFWriter.ggml_pad(nbytes, ALIGNMENT_BYTES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(gguf.GGUFWriter.ggml_pad(path.stat().st_size, ALIGNMENT_BYTES) + length)
    return path


def _common_keys(model: Model) -> dict[str, Value]:
    return {
        "vocab_size": model.vocab,
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.width,
        "feed_forward_length": model.feed_forward,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head,
        "attention.value_length": model.head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": model.head,
    } | dict(model.keys)


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: int) -> None:
    bytes_first = [f"<0x{byte:02X}>" for byte in range(256)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list((bytes_first + [f"word{index}" for index in range(tokens - 256)])[:tokens])
    writer.add_token_scores([0.0] * tokens)
    writer.add_token_types(([gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * tokens)[:tokens])


def _add(writer: gguf.GGUFWriter, key: str, value: Value | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _attention(model: Model) -> Dimensions:
    queries, keys = model.heads * model.head, model.kv_heads * model.head
    return {
        "attn_norm.weight": (model.width,),
        "attn_q.weight": (model.width, queries),
        "attn_k.weight": (model.width, keys),
        "attn_v.weight": (model.width, keys),
        "attn_output.weight": (queries, model.width),
    }


def _feed_forward(model: Model, length: int | None = None) -> Dimensions:
    length = length or model.feed_forward
    return {
        "ffn_norm.weight": (model.width,),
        "ffn_gate.weight": (model.width, length),
        "ffn_up.weight": (model.width, length),
        "ffn_down.weight": (length, model.width),
    }


def _experts(model: Model, length: int) -> Dimensions:
    experts = model.keys["expert_count"]
    assert isinstance(experts, int)
    return {
        "ffn_norm.weight": (model.width,),
        "ffn_gate_inp.weight": (model.width, experts),
        "ffn_gate_exps.weight": (model.width, length, experts),
        "ffn_up_exps.weight": (model.width, length, experts),
        "ffn_down_exps.weight": (length, model.width, experts),
    }


def _llama(model: Model, layer: int) -> Dimensions:
    return _attention(model) | _feed_forward(model)


def _mixtral(model: Model, layer: int) -> Dimensions:
    return _attention(model) | _experts(model, model.feed_forward)


def _qk_norms(model: Model) -> Dimensions:
    return {"attn_q_norm.weight": (model.head,), "attn_k_norm.weight": (model.head,)}


def _qwen2(model: Model, layer: int) -> Dimensions:
    biases: Dimensions = {
        "attn_q.bias": (model.heads * model.head,),
        "attn_k.bias": (model.kv_heads * model.head,),
        "attn_v.bias": (model.kv_heads * model.head,),
    }
    return _attention(model) | biases | _feed_forward(model)


def _qwen3(model: Model, layer: int) -> Dimensions:
    return _attention(model) | _qk_norms(model) | _feed_forward(model)


def _qwen3moe(model: Model, layer: int) -> Dimensions:
    length = model.keys["expert_feed_forward_length"]
    assert isinstance(length, int)
    return _attention(model) | _qk_norms(model) | _experts(model, length)


def _gemma3(model: Model, layer: int) -> Dimensions:
    norms: Dimensions = {
        "post_attention_norm.weight": (model.width,),
        "post_ffw_norm.weight": (model.width,),
    }
    return _attention(model) | _qk_norms(model) | norms | _feed_forward(model)


def _gpt_oss(model: Model, layer: int) -> Dimensions:
    experts = model.keys["expert_count"]
    assert isinstance(experts, int)
    biases: Dimensions = {
        "post_attention_norm.weight": (model.width,),
        "attn_sinks.weight": (model.heads,),
        "attn_q.bias": (model.heads * model.head,),
        "attn_k.bias": (model.kv_heads * model.head,),
        "attn_v.bias": (model.kv_heads * model.head,),
        "attn_output.bias": (model.width,),
        "ffn_gate_inp.bias": (experts,),
        "ffn_gate_exps.bias": (model.feed_forward, experts),
        "ffn_up_exps.bias": (model.feed_forward, experts),
        "ffn_down_exps.bias": (model.width, experts),
    }
    block = _attention(model) | biases | _experts(model, model.feed_forward)
    del block["ffn_norm.weight"]
    return block


def _deepseek2(model: Model, layer: int) -> Dimensions:
    latent, rotated, nope, value = 512, 64, 128, 128
    attention: Dimensions = {
        "attn_norm.weight": (model.width,),
        "attn_q.weight": (model.width, model.heads * (nope + rotated)),
        "attn_kv_a_mqa.weight": (model.width, latent + rotated),
        "attn_kv_a_norm.weight": (latent,),
        "attn_k_b.weight": (nope, latent, model.heads),
        "attn_v_b.weight": (latent, value, model.heads),
        "attn_output.weight": (model.heads * value, model.width),
    }
    if layer == 0:
        return attention | _feed_forward(model)
    shared: Dimensions = {
        "ffn_gate_shexp.weight": (model.width, 2 * 1408),
        "ffn_up_shexp.weight": (model.width, 2 * 1408),
        "ffn_down_shexp.weight": (2 * 1408, model.width),
    }
    return attention | _experts(model, 1408) | shared


def _mamba(model: Model, layer: int) -> Dimensions:
    inner, state, rank = 2 * model.width, 16, model.width // 16
    return {
        "attn_norm.weight": (model.width,),
        "ssm_in.weight": (model.width, 2 * inner),
        "ssm_conv1d.weight": (4, inner),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (inner, rank + 2 * state),
        "ssm_dt.weight": (rank, inner),
        "ssm_dt.bias": (inner,),
        "ssm_a": (state, inner),
        "ssm_d": (inner,),
        "ssm_out.weight": (inner, model.width),
    }


def _qwen3next(model: Model, layer: int) -> Dimensions:
    keys, values, heads = 2048, 4096, 32
    experts: Dimensions = _experts(model, 512) | {
        "post_attention_norm.weight": (model.width,),
        "ffn_gate_inp_shexp.weight": (model.width,),
        "ffn_gate_shexp.weight": (model.width, 512),
        "ffn_up_shexp.weight": (model.width, 512),
        "ffn_down_shexp.weight": (512, model.width),
    }
    del experts["ffn_norm.weight"]
    if layer % 4 == 3:
        gated = {"attn_q.weight": (model.width, 2 * model.heads * model.head)}
        return _attention(model) | gated | _qk_norms(model) | experts
    return {
        "attn_norm.weight": (model.width,),
        "attn_qkv.weight": (model.width, 2 * keys + values),
        "attn_gate.weight": (model.width, values),
        "ssm_conv1d.weight": (4, 2 * keys + values),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_ba.weight": (model.width, 2 * heads),
        "ssm_norm.weight": (values // heads,),
        "ssm_out.weight": (values, model.width),
    } | experts


def _gemma2(model: Model, layer: int) -> Dimensions:
    block = _gemma3(model, layer)
    del block["attn_q_norm.weight"], block["attn_k_norm.weight"]
    return block


def _cohere2(model: Model, layer: int) -> Dimensions:
    block = _llama(model, layer)
    del block["ffn_norm.weight"]
    return block


def _olmo2(model: Model, layer: int) -> Dimensions:
    block = _gemma2(model, layer) | {
        "attn_q_norm.weight": (model.heads * model.head,),
        "attn_k_norm.weight": (model.kv_heads * model.head,),
    }
    del block["attn_norm.weight"], block["ffn_norm.weight"]
    return block


def _llama4(model: Model, layer: int) -> Dimensions:
    shared: Dimensions = {
        "ffn_gate_shexp.weight": (model.width, 8192),
        "ffn_up_shexp.weight": (model.width, 8192),
        "ffn_down_shexp.weight": (8192, model.width),
    }
    return _attention(model) | _experts(model, 8192) | shared


def _glm4moe(model: Model, layer: int) -> Dimensions:
    block = _qwen2(model, layer) | {"post_attention_norm.weight": (model.width,)}
    if layer > 0:
        block = {name: shape for name, shape in block.items() if not name.startswith("ffn_")}
        block |= _experts(model, 1408) | {
            "exp_probs_b.bias": (128,),
            "ffn_gate_shexp.weight": (model.width, 1408),
            "ffn_up_shexp.weight": (model.width, 1408),
            "ffn_down_shexp.weight": (1408, model.width),
        }
    del block["ffn_norm.weight"]
    if layer == model.layers - 1:
        block |= {
            "nextn.eh_proj.weight": (2 * model.width, model.width),
            "nextn.enorm.weight": (model.width,),
            "nextn.hnorm.weight": (model.width,),
            "nextn.shared_head_norm.weight": (model.width,),
        }
    return block


_LFM2_KV_HEADS = [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0]


def _lfm2(model: Model, layer: int) -> Dimensions:
    if _LFM2_KV_HEADS[layer]:
        return _attention(model) | _qk_norms(model) | _feed_forward(model)
    convolution: Dimensions = {
        "attn_norm.weight": (model.width,),
        "shortconv.conv.weight": (3, model.width),
        "shortconv.in_proj.weight": (model.width, 3 * model.width),
        "shortconv.out_proj.weight": (model.width, model.width),
    }
    return convolution | _feed_forward(model)


def _more_bits(layer: int, layers: int) -> bool:
    """llama-quantize's ``use_more_bits``: the first and last eighths, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def q4_k_m(model: Model, name: str, layer: int) -> Type:
    """The mix that ``Q4_K_M`` stands for (src/llama-quant.cpp)."""
    eight_experts = model.keys.get("expert_count") == 8
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return Type.Q6_K
    if eight_experts and ("attn_k." in name or "attn_v." in name):
        return Type.Q8_0
    if eight_experts and "attn_output." in name:
        return Type.Q5_K
    if "attn_v." in name and model.layers == 80:
        return Type.Q5_K
    if ("attn_v." in name or "ffn_down" in name) and _more_bits(layer, model.layers):
        return Type.Q6_K
    return Type.Q4_K


def mxfp4(model: Model, name: str, layer: int) -> Type:
    """gpt-oss as published: experts in MXFP4, all else in Q8_0."""
    return Type.MXFP4 if "_exps." in name else Type.Q8_0


def q8_0(model: Model, name: str, layer: int) -> Type:
    """Everything in Q8_0."""
    return Type.Q8_0


LLAMA_3_2_1B = Model(
    "llama", 16, 2048, 32, 8, 64, 128256, 8192, _llama, tied=True,
    outside={"rope_freqs.weight": (32,)}, types=q4_k_m,
)  # fmt: skip
LLAMA_3_1_8B = Model(
    "llama", 32, 4096, 32, 8, 128, 128256, 14336, _llama,
    outside={"rope_freqs.weight": (64,)}, types=q4_k_m,
)  # fmt: skip
LLAMA_3_3_70B = Model(
    "llama", 80, 8192, 64, 8, 128, 128256, 28672, _llama,
    outside={"rope_freqs.weight": (64,)}, types=q4_k_m,
)  # fmt: skip
QWEN2_5_32B = Model(
    "qwen2", 64, 5120, 40, 8, 128, 152064, 27648, _qwen2, context=32768, types=q4_k_m
)  # fmt: skip
QWEN3_32B = Model("qwen3", 64, 5120, 64, 8, 128, 151936, 25600, _qwen3, context=40960, types=q4_k_m)
MIXTRAL_8X7B = Model(
    "llama", 32, 4096, 32, 8, 128, 32000, 14336, _mixtral, context=32768, types=q4_k_m,
    keys={"expert_count": 8, "expert_used_count": 2},
)  # fmt: skip
QWEN3_30B_A3B = Model(
    "qwen3moe", 48, 2048, 32, 4, 128, 151936, 6144, _qwen3moe, context=40960, types=q4_k_m,
    keys={"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768},
)  # fmt: skip
GPT_OSS_120B = Model(
    "gpt-oss", 36, 2880, 64, 8, 64, 201088, 2880, _gpt_oss, types=mxfp4,
    keys={
        "expert_count": 128, "expert_used_count": 4, "expert_feed_forward_length": 2880,
        "attention.sliding_window": 128, "rope.freq_base": 150000.0,
    },
)  # fmt: skip
GEMMA_3_27B = Model(
    "gemma3", 62, 5376, 32, 16, 128, 262144, 21504, _gemma3, tied=True, types=q4_k_m,
    keys={"attention.sliding_window": 1024},
)  # fmt: skip
DEEPSEEK_V2_LITE = Model(
    "deepseek2", 27, 2048, 16, 1, 576, 102400, 10944, _deepseek2, context=163840, types=q8_0,
    keys={
        "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512, "rope.dimension_count": 64, "leading_dense_block_count": 1,
        "expert_count": 64, "expert_used_count": 6, "expert_shared_count": 2,
        "expert_feed_forward_length": 1408, "expert_weights_scale": 1.0, "expert_gating_func": 1,
    },
)  # fmt: skip
MAMBA_2_8B = Model(
    "mamba", 64, 2560, 0, 0, 0, 50280, 0, _mamba, tied=True, context=1048576, types=q8_0,
    keys={"ssm.conv_kernel": 4, "ssm.inner_size": 5120, "ssm.state_size": 16, "ssm.time_step_rank": 160},
)  # fmt: skip
LFM2_1_2B = Model(
    "lfm2", 16, 2048, 32, 8, 64, 65536, 8192, _lfm2, tied=True, context=128000, types=q8_0,
    keys={"attention.head_count_kv": _LFM2_KV_HEADS, "shortconv.l_cache": 3},
    output_norm="token_embd_norm.weight",
)  # fmt: skip
QWEN3_NEXT_80B = Model(
    "qwen3next", 48, 2048, 16, 2, 256, 151936, 5120, _qwen3next, context=262144, types=q8_0,
    keys={
        "expert_count": 512, "expert_used_count": 10, "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512, "rope.dimension_count": 64, "full_attention_interval": 4,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32,
        "ssm.inner_size": 4096,
    },
)  # fmt: skip
GEMMA_2_27B = Model(
    "gemma2", 46, 4608, 32, 16, 128, 256128, 36864, _gemma2, tied=True, context=8192, types=q4_k_m,
    keys={"attention.sliding_window": 4096},
)  # fmt: skip
COMMAND_R7B = Model(
    "cohere2", 32, 4096, 32, 8, 128, 256000, 14336, _cohere2, tied=True, context=8192, types=q4_k_m,
    keys={"attention.sliding_window": 4096, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.25},
)  # fmt: skip
OLMO_3_32B = Model(
    "olmo2", 64, 5120, 40, 8, 128, 100278, 27648, _olmo2, context=65536, types=q4_k_m,
    keys={"attention.sliding_window": 4096},
)  # fmt: skip
LLAMA_4_SCOUT = Model(
    "llama4", 48, 5120, 40, 8, 128, 202048, 16384, _llama4, context=10485760, types=q4_k_m,
    keys={
        "expert_count": 16, "expert_used_count": 1, "expert_feed_forward_length": 8192,
        "interleave_moe_layer_step": 1, "rope.freq_base": 500000.0,
    },
)  # fmt: skip
GLM_4_5_AIR = Model(
    "glm4moe", 47, 4096, 96, 8, 128, 151552, 10944, _glm4moe, types=q4_k_m,
    keys={
        "expert_count": 128, "expert_used_count": 8, "expert_shared_count": 1, "nextn_predict_layers": 1,
        "expert_feed_forward_length": 1408, "leading_dense_block_count": 1, "rope.dimension_count": 64,
        "expert_weights_scale": 1.0, "expert_gating_func": 2,
    },
)  # fmt: skip
