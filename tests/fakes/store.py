"""The models and blobs a node holds, and Ollama's model names."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

GIB = 1 << 30
ALL_CAPABILITIES = ("completion", "vision", "tools", "insert", "thinking")

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    rf"^(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{{0,349}})/)?(?:(?P<ns>{_PART})/)?(?P<model>{_PART})(?::(?P<tag>{_PART}))?$"
)
_NS_ONLY = re.compile(rf"^(?P<ns>{_PART})/(?P<model>{_PART})(?::(?P<tag>{_PART}))?$")


def canonical(name: str) -> str | None:
    """Return a name's key (``host/ns/model:tag``, lower case), ``None`` if it is no valid name."""
    found = _NS_ONLY.match(name) or _NAME.match(name)
    if not found:
        return None
    parts = found.groupdict()
    host, ns = parts.get("host") or "registry.ollama.ai", parts.get("ns") or "library"
    return f"{host}/{ns}/{parts['model']}:{parts.get('tag') or 'latest'}".lower()


def short(name: str) -> str:
    """Return a name as listings show it: with its tag, without the default host and namespace."""
    prefix = re.compile(r"^registry\.ollama\.ai/(library/)?", re.IGNORECASE)
    bare = prefix.sub("", name)
    bare = bare.removeprefix("library/")
    return bare if ":" in bare.rsplit("/", 1)[-1] else f"{bare}:latest"


def sha256(text: str) -> str:
    """Return the hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FakeModel:
    """A model as a node holds it; the geometry is that of Llama 3.2 3B."""

    name: str
    size: int = 2 * GIB
    architecture: str = "llama"
    block_count: int = 28
    embedding_length: int = 3072
    head_count: int = 24
    head_count_kv: int = 8
    context_length: int = 131_072
    parameter_size: str = "3.2B"
    quantization_level: str = "Q4_K_M"
    capabilities: tuple[str, ...] = ALL_CAPABILITIES
    parameters: dict[str, Any] = field(default_factory=dict)
    template: str = "{{ .Prompt }}"
    system: str = ""
    license: str = ""
    modified_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    version: str = "1"
    digest_override: str | None = None
    blob_override: str | None = None

    @property
    def digest(self) -> str:
        """Hex sha256 of the manifest; ``version`` makes another one of the same name."""
        return self.digest_override or sha256(f"manifest {canonical(self.name)} {self.version} {self.size}")

    @property
    def blob(self) -> str:
        """Hex sha256 of the GGUF, which is the runner's key: copies of a model share it."""
        return self.blob_override or sha256(f"gguf {canonical(self.name)} {self.version} {self.size}")

    def kv_bytes(self, num_ctx: int, parallel: int) -> int:
        """Return Ollama's prediction of the KV cache: 2·layers·kv heads·head size·context·2 bytes."""
        head = self.embedding_length // max(1, self.head_count)
        return 2 * self.block_count * self.head_count_kv * head * num_ctx * parallel * 2

    @property
    def details(self) -> dict[str, Any]:
        """``details`` as ps and show have it."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization_level,
        }

    def model_info(self, verbose: bool = False) -> dict[str, Any]:
        """``model_info`` as show has it: arrays are null unless ``verbose``."""
        arch = self.architecture
        return {
            "general.architecture": arch,
            "general.parameter_count": self.size * 2,
            f"{arch}.attention.head_count": self.head_count,
            f"{arch}.attention.head_count_kv": self.head_count_kv,
            f"{arch}.attention.key_length": self.embedding_length // max(1, self.head_count),
            f"{arch}.attention.value_length": self.embedding_length // max(1, self.head_count),
            f"{arch}.block_count": self.block_count,
            f"{arch}.context_length": self.context_length,
            f"{arch}.embedding_length": self.embedding_length,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": ["a", "b"] if verbose else None,
        }


def embedding_model(name: str = "nomic-embed-text", **changes: Any) -> FakeModel:
    """Return a small embedding-only model."""
    geometry: dict[str, Any] = {
        "size": 274 << 20, "architecture": "nomic-bert", "block_count": 12, "embedding_length": 64,
        "head_count": 8, "head_count_kv": 8, "context_length": 2048, "parameter_size": "137M",
        "quantization_level": "F16", "capabilities": ("embedding",),
    }  # fmt: skip
    return FakeModel(name, **{**geometry, **changes})


@dataclass
class Store:
    """What the node's disk holds. ``remote`` is what the registry offers to ``pull``."""

    models: dict[str, FakeModel] = field(default_factory=dict)
    blobs: dict[str, int] = field(default_factory=dict)
    remote: dict[str, FakeModel] = field(default_factory=dict)

    def add(self, model: FakeModel) -> None:
        """Hold a model."""
        key = canonical(model.name)
        if key is None:
            raise ValueError(f"{model.name!r} is no model name")
        self.models[key] = model
        self.blobs[f"sha256:{model.blob}"] = model.size

    def find(self, name: str) -> FakeModel | None:
        """Return the model of that name, matched without regard to case."""
        key = canonical(name)
        return None if key is None else self.models.get(key)

    def remove(self, name: str) -> bool:
        """Drop a name; its blob goes with the last name that uses it. Return whether there was one."""
        model = self.models.pop(canonical(name) or "", None)
        if model is None:
            return False
        if all(other.blob != model.blob for other in self.models.values()):
            self.blobs.pop(f"sha256:{model.blob}", None)
        return True

    def copy(self, source: str, destination: str) -> bool:
        """Give a model a second name, with the same manifest and blob. Return whether there was a source."""
        model = self.find(source)
        if model is None:
            return False
        self.add(
            replace(
                model,
                name=destination,
                digest_override=model.digest,
                blob_override=model.blob,
                modified_at=datetime.now(UTC),
            )
        )
        return True

    def listing(self) -> list[FakeModel]:
        """Return the models, the last modified first."""
        return sorted(self.models.values(), key=lambda m: m.modified_at, reverse=True)
