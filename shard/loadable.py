"""Whether stock llama.cpp can load a GGUF, told from its header before anything starts.

Ollama's own converters wrote files that its llama.cpp loads only with patches (ollama/ollama,
llama/compat/README.md): the vision tower in the same file, other names for architectures and tensors, keys
left out. Each row below is one such difference, or one way in which a file is no whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from shard.gguf import Header, SkippedArray

#: The llama.cpp build that the lists below describe; another one may know more.
PINNED_BUILD = "7e4c0a9"

# What build b10434 loads beyond the architectures that the `gguf` package names.
_KNOWN_BESIDE_GGUF = (
    "cohere2moe", "deepseek32", "deepseek4", "dflash", "eagle3", "gemma4-assistant", "graniteswitch", "hy_v3",
    "laguna", "minimax-m3", "talkie",
)  # fmt: skip
# Architectures that only Ollama writes → what llama.cpp calls the same model.
_OLLAMA_NAMES: Mapping[str, str] = {
    "gptoss": "gpt-oss",
    "qwen25vl": "qwen2vl",
    "olmo3": "olmo2",
    "glm4moelite": "deepseek2",
    "deepseekocr": "deepseek2-ocr",
    "glmocr": "glm4",
    "nemotron_h_omni": "nemotron_h_moe",
    "mllama": "mllama, which it does not have",
}
# Vision towers, projectors, audio encoders, multi-token prediction: for llama.cpp a file of their own.
_FOREIGN_TENSORS = re.compile(r"(v|mm|a|mtp|s|sam|vision|audio|multi_modal_projector|model\.vision\w*)\.")
# Removed from ggml; a file of such a type has to be quantised anew (ggml.h, enum ggml_type).
_REMOVED_TYPES: Mapping[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
# Architecture → keys without which llama.cpp does not load it, and which some Ollama files lack.
_REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = {"gemma3": ("attention.layer_norm_rms_epsilon",)}
# Architecture → what Ollama calls a tensor, and what llama.cpp looks for in its place.
_RENAMED_TENSORS: Mapping[str, tuple[str, str]] = {
    "gemma3": (r"dense\.0\.weight", "dense_2.weight"),
    "laguna": (r"blk\.\d+\.attn_g\.weight", "attn_gate.weight"),
    "lfm2": (r"output_norm\.weight", "token_embd_norm.weight"),
    "nemotron_h_moe": (r"blk\.\d+\.ffn_latent_in\.weight", "ffn_latent_down.weight"),
    "qwen35": (r"blk\.\d+\.ssm_dt", "ssm_dt.bias"),
    "qwen35moe": (r"blk\.\d+\.ssm_dt", "ssm_dt.bias"),
    "qwen3next": (r"blk\.\d+\.ssm_dt", "ssm_dt.bias"),
}

# general.type of what is only part of a model, or goes with one.
_PARTS: Mapping[str, str] = {
    "mmproj": "a projector", "adapter": "an adapter", "imatrix": "an importance matrix",
}  # fmt: skip

_PULL = (
    "take a GGUF that llama.cpp's own converter wrote, for example from Hugging Face (ollama pull hf.co/…)"
)


def refusal(header: Header, build: str = PINNED_BUILD) -> str | None:
    """Return the sentence why stock llama.cpp cannot load this file, None if nothing speaks against it.

    ``build`` is that of the llama-server which is to load it. What one build does not know yet another may,
    so an unknown architecture or tensor type is held against a file for the pinned build only.
    """
    for check in _CHECKS:
        if (check.new_builds_may_load and build != PINNED_BUILD) or (reason := check.reason(header)) is None:
            continue
        return f"{_name(header)} cannot be sharded: {reason}; {check.advice}"
    return None


def _name(header: Header) -> str:
    name = header.metadata.get("general.name")
    return f"{name} ({header.path.name})" if name else header.path.name


def _part(header: Header) -> str | None:
    kind = header.metadata.get("general.type")
    part = _PARTS.get("mmproj" if header.architecture == "clip" else str(kind))
    return f"it is no model of its own but {part}" if part else None


def _split(header: Header) -> str | None:
    parts = header.metadata.get("split.count", 0)
    return f"it is one of {parts} parts" if parts > 1 else None


def _cut_short(header: Header) -> str | None:
    last = max((tensor.offset_bytes for tensor in header.tensors), default=0)
    begins = header.data_offset_bytes + last
    if header.size_bytes > begins or not header.tensors:
        return None
    return f"the file ends at byte {header.size_bytes}, before its last tensor at byte {begins}"


def _ollama_name(header: Header) -> str | None:
    if name := _OLLAMA_NAMES.get(header.architecture):
        return f"Ollama wrote it as {header.architecture}, where stock llama.cpp expects {name}"
    return None


def _unknown_architecture(header: Header) -> str | None:
    from gguf import MODEL_ARCH_NAMES  # imports numpy: 0.7 s, once

    if header.architecture in {*MODEL_ARCH_NAMES.values(), *_KNOWN_BESIDE_GGUF}:
        return None
    return f"llama.cpp {PINNED_BUILD} does not know the architecture {header.architecture}"


def _foreign_tensors(header: Header) -> str | None:
    found = [tensor.name for tensor in header.tensors if _FOREIGN_TENSORS.match(tensor.name)]
    if not found:
        return None
    return (
        f"Ollama put the tensors of an encoder or a draft ({found[0]}, {len(found)} in all) into the model's "
        "own file, which stock llama.cpp refuses"
    )


def _missing_key(header: Header) -> str | None:
    for key in _REQUIRED_KEYS.get(header.architecture, ()):
        if header.of_architecture(key) is None:
            return f"its header lacks {header.architecture}.{key}, which stock llama.cpp requires"
    return None


def _renamed_tensor(header: Header) -> str | None:
    pattern, wanted = _RENAMED_TENSORS.get(header.architecture, ("", ""))
    for tensor in header.tensors:
        if re.fullmatch(pattern, tensor.name):
            return f"Ollama named a tensor {tensor.name} where stock llama.cpp looks for {wanted}"
    return None


def _vocabulary(header: Header) -> str | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = tokens.length if isinstance(tokens, SkippedArray) else len(tokens or ())
    rows = {
        tensor.name: tensor.shape[-1]
        for tensor in header.tensors
        if tensor.name in ("token_embd.weight", "per_layer_token_embd.weight")
    }
    for name, length in rows.items():
        if count and length != count:
            return f"its tokenizer has {count} tokens and {name} {length} rows"
    return None


def _removed_type(header: Header) -> str | None:
    for tensor in header.tensors:
        if name := _REMOVED_TYPES.get(tensor.ggml_type):
            return f"{tensor.name} has the type {name}, which ggml no longer has"
    return None


def _unknown_type(header: Header) -> str | None:
    from gguf import GGMLQuantizationType  # imports numpy: 0.7 s, once

    known = {int(kind) for kind in GGMLQuantizationType}
    for tensor in header.tensors:
        if tensor.ggml_type not in known:
            return (
                f"{tensor.name} has the type {tensor.ggml_type}, which llama.cpp {PINNED_BUILD} does not know"
            )
    return None


class _Check(NamedTuple):
    reason: Callable[[Header], str | None]
    advice: str
    new_builds_may_load: bool = False


_CHECKS = (
    _Check(_part, "name the model's file"),
    _Check(_split, "join the parts first (llama-gguf-split --merge)"),
    _Check(_cut_short, "fetch it again"),
    _Check(_ollama_name, _PULL),
    _Check(_unknown_architecture, "take a newer llama.cpp on every node", new_builds_may_load=True),
    _Check(_foreign_tensors, _PULL),
    _Check(_missing_key, _PULL),
    _Check(_renamed_tensor, _PULL),
    _Check(_vocabulary, _PULL),
    _Check(_removed_type, "quantise it anew"),
    _Check(_unknown_type, "take a newer llama.cpp on every node", new_builds_may_load=True),
)
