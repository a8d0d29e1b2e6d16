"""What a model can do, in Ollama's words.

The rules are those of Ollama v0.33 (``Capabilities`` in ``server/images.go``, ``model/parsers/parsers.go``)
on the same evidence: header, the template that makes the prompts, and what Ollama wrote down.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shard.chat_template import Rendering, jinja_capabilities
from shard.gguf import Header

# The configuration's parser → whether it understands tools, whether it separates thinking.
_PARSERS: Mapping[str, tuple[bool, bool]] = {
    "cogito": (True, True),
    "deepseek3": (True, True),
    "functiongemma": (True, False),
    "gemma4": (True, True),
    "gemma4-no-thinking": (True, False),
    "glm-4.7": (True, True),
    "glm-ocr": (True, False),
    "harmony": (True, True),
    "lfm2": (True, False),
    "lfm2-thinking": (True, True),
    "ministral": (True, False),
    "nemotron-3-nano": (True, True),
    "olmo3": (True, False),
    "olmo3-think": (False, True),
    "qwen3": (True, False),
    "qwen3-coder": (True, False),
    "qwen3-thinking": (True, True),
    "qwen3-vl-instruct": (True, False),
    "qwen3-vl-thinking": (True, True),
    "qwen3.5": (True, True),
}
_NEITHER = (False, False)

_GPT_OSS = ("gptoss", "gpt-oss")


def capabilities(
    header: Header, config: Mapping[str, Any], rendering: Rendering, projector: Path | None
) -> list[str]:
    """Return what a model can do; ``config`` is what Ollama wrote of it, declared capabilities among it."""
    go = rendering.template
    rendered = jinja_capabilities(header.chat_template or "") if go is None else go.capabilities
    # Without a template of Ollama's, llama-server infills whatever has the tokens for it.
    fills = go is None and "tokenizer.ggml.fim_pre_token_id" in header.metadata
    tools, thinking = _PARSERS.get(str(config.get("parser") or ""), _NEITHER)
    can = {
        "completion": not header.is_embedding_model,
        "embedding": header.is_embedding_model,
        "vision": header.of_architecture("vision.block_count") is not None or projector is not None,
        "audio": header.of_architecture("audio.block_count") is not None,
        "tools": "tools" in rendered or tools,
        "insert": "insert" in rendered or fills,
        "thinking": "thinking" in rendered or thinking or config.get("model_family") in _GPT_OSS,
    }
    declared = [str(name) for name in config.get("capabilities") or []]
    return declared + [name for name, yes in can.items() if yes and name not in declared]
