"""Ollama's model store on disk: names → manifests → the files of their layers.

``manifests/<host>/<namespace>/<model>/<tag>`` holds a Docker-v2 manifest, ``blobs/sha256-<hex>`` what its
layers consist of. Nothing here writes, asks a server or reads weights. Finding models reads their manifests
alone; the texts of a model (template, parameters, …) are read when asked for, and bounded. Sources:
``manifest/manifest.go``, ``manifest/paths.go`` and ``server/images.go`` of Ollama v0.33.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from agent.ollama import names

# Where an Ollama that was installed as a service keeps its models (its install.sh).
_SERVICE_STORE = Path("/usr/share/ollama/.ollama/models")

# systemd.unit(5), least important first: what lies later overrides what lies earlier.
_UNIT_DIRECTORIES = (
    Path("/usr/lib/systemd/system"),
    Path("/run/systemd/system"),
    Path("/etc/systemd/system"),
)
_UNIT = "ollama.service"

# A manifest of thousands of tensor layers has about a MiB, the longest licences 100 kB.
MAX_MANIFEST_BYTES = 16 << 20
MAX_TEXT_BYTES = 4 << 20

# Newer Ollama keeps names under manifests-v2, as links into blobs; what is there hides the older place. It
# also writes the public registry as ollama.com there, which is the same host (manifest/paths.go).
_MANIFEST_DIRECTORIES = ("manifests-v2", "manifests")
_PUBLIC_HOSTS = ("ollama.com", names.DEFAULT_HOST)
_MANIFEST_LIST = "application/vnd.ollama.manifest.list.v2+json"
# The entries of a manifest list that llama.cpp can run, the preferred one first.
_RUNNERS = ("ollama", "llamacpp", "")

_LAYER_TYPE = "application/vnd.ollama.image."
# The only form that becomes a path, so that no manifest names a file outside of blobs.
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


class NotStored(Exception):
    """A model, or a part of it, cannot be had from the store; the message is one sentence that says why."""


def find_store() -> Path | None:
    """Return Ollama's model directory, None where there is none.

    ``$OLLAMA_MODELS`` of this process comes first, then that of the systemd service, then the first usual
    place that exists.
    """
    configured = _unquoted(os.environ.get("OLLAMA_MODELS", "")) or service_setting(_UNIT_DIRECTORIES)
    if configured:
        return Path(configured)
    candidates = [Path("~/.ollama/models").expanduser(), _SERVICE_STORE]
    return next((path for path in candidates if _exists(path)), None)


def service_setting(unit_directories: Iterable[Path], variable: str = "OLLAMA_MODELS") -> str | None:
    """Return what the service's unit or its drop-ins set ``variable`` to, None if they do not.

    Files that may not be read count as not there.
    """
    # The most important unit hides the others, each drop-in those of its name; drop-ins go by their names.
    units = [directory / _UNIT for directory in unit_directories]
    drop_ins = {path.name: path for unit in units for path in _listed(unit.with_name(_UNIT + ".d"), "*.conf")}
    there = [unit for unit in units if _exists(unit)]
    value: str | None = None
    for path in (*there[-1:], *(drop_ins[name] for name in sorted(drop_ins))):
        for line in _lines(path):
            key, _, assigned = line.partition("=")
            if key.strip() != "Environment":
                continue
            if not assigned.strip():  # an empty assignment forgets the earlier ones
                value = None
            for name, _, given in (pair.partition("=") for pair in _words(assigned)):
                value = (_unquoted(given) or None) if name == variable else value
    return value


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of a manifest: what it is, which file holds it, and from which model it was taken over."""

    kind: str
    digest: str
    size_bytes: int
    taken_from: str = ""


@dataclass(frozen=True)
class StoredModel:
    """A model of the store. Its texts are read at their first use, which may raise NotStored."""

    root: Path
    name: str
    digest: str
    size_bytes: int
    modified_at: datetime
    config_digest: str
    layers: tuple[Layer, ...]

    @property
    def key(self) -> str:
        """What names are compared by."""
        return names.canonical(self.name)

    @property
    def blob(self) -> Path | None:
        """The GGUF file; None for a model of another format and for one that runs in the cloud."""
        paths = self._paths("model")
        return paths[-1] if paths else None

    @property
    def parts(self) -> int:
        """Into how many files the weights are split; 1 for all but some that were pulled from elsewhere."""
        return len(self._paths("model"))

    @property
    def projector(self) -> Path | None:
        """The file that turns images into embeddings."""
        return next(iter(self._paths("projector")), None)

    @property
    def adapters(self) -> tuple[Path, ...]:
        """LoRA files, in their order."""
        return self._paths("adapter")

    @property
    def draft(self) -> Path | None:
        """The file of a small model that speculates for this one."""
        return next(iter(self._paths("draft")), None)

    @property
    def parent(self) -> str:
        """The model from which the weights were taken over, as its creator wrote it; empty if from none."""
        return next((layer.taken_from for layer in reversed(self.layers) if layer.kind == "model"), "")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What Ollama wrote down about the model: format, family, renderer, parser, remote_host, …"""
        if not self.config_digest:
            return {}
        return self._object("configuration", _read_text(self._path(self.config_digest), self.name))

    @property
    def format(self) -> str:
        """``gguf`` or ``safetensors``; empty for a model that runs in the cloud."""
        tensors = any(layer.kind == "tensor" for layer in self.layers)
        fallback = "safetensors" if tensors else "gguf" if self.blob else ""
        return str(self.config.get("model_format") or fallback)

    @property
    def remote_host(self) -> str:
        """The host that runs a cloud model; empty for all others."""
        return str(self.config.get("remote_host") or "")

    @cached_property
    def template(self) -> str | None:
        """The Go template, None if the model leaves it to its GGUF."""
        texts = self._texts("template", "prompt")
        return texts[-1] if texts else None

    @cached_property
    def system(self) -> str | None:
        """The Modelfile's system text."""
        texts = self._texts("system")
        return texts[-1] if texts else None

    @cached_property
    def params(self) -> Mapping[str, Any]:
        """The Modelfile's options."""
        texts = self._texts("params")
        return self._object("parameter", texts[-1]) if texts else {}

    @cached_property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The Modelfile's messages, with which every conversation begins."""
        texts = self._texts("messages")
        if not texts:
            return ()
        found = _parsed(texts[-1])
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            raise NotStored(f"{self.name}: its messages layer is damaged; pull it again")
        return tuple(found)

    @cached_property
    def license(self) -> tuple[str, ...]:
        """The licences' texts."""
        return self._texts("license")

    def missing(self) -> str | None:
        """Return the sentence that names a file of the model which is not there whole, None if all are."""
        files = [("configuration", self.config_digest, 0)] if self.config_digest else []
        files += [(layer.kind, layer.digest, layer.size_bytes) for layer in self.layers]
        for kind, digest, size_bytes in files:
            path = self._path(digest)
            try:
                found = path.stat()
            except OSError as error:
                reason = "is missing" if isinstance(error, FileNotFoundError) else _why(error)
                return f"{self.name}: its {kind} layer {path.name} {reason}; pull it again"
            if kind == "model" and found.st_size < size_bytes:
                return f"{self.name}: its {kind} layer {path.name} is incomplete; pull it again"
        return None

    def _paths(self, kind: str) -> tuple[Path, ...]:
        return tuple(self._path(layer.digest) for layer in self.layers if layer.kind == kind)

    def _path(self, digest: str) -> Path:
        return _blob_path(self.root, digest)

    def _texts(self, *kinds: str) -> tuple[str, ...]:
        wanted = [layer for layer in self.layers if layer.kind in kinds]
        return tuple(_read_text(self._path(layer.digest), self.name) for layer in wanted)

    def _object(self, what: str, text: str) -> Mapping[str, Any]:
        found = _parsed(text)
        if not isinstance(found, dict):
            raise NotStored(f"{self.name}: its {what} layer is damaged; pull it again")
        return found


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a store holds: its models, and for every name whose manifest is unusable the sentence why."""

    models: tuple[StoredModel, ...]
    broken: Mapping[str, str]


def scan(root: Path) -> Inventory:
    """Return what the store at ``root`` holds. Raises NotStored if the store itself cannot be read."""
    found: list[StoredModel] = []
    broken: dict[str, str] = {}
    for name, path in manifests(root).items():
        try:
            found.append(read_manifest(root, name, path))
        except NotStored as error:
            broken[name] = str(error)
    return Inventory(tuple(found), broken)


def models(root: Path) -> list[StoredModel]:
    """Return the models of the store at ``root`` whose manifests are sound; raises as :func:`scan`."""
    return list(scan(root).models)


def resolve(root: Path, name: str) -> StoredModel:
    """Return the model that a client means by ``name``, all of whose files are there.

    Raises NotStored where it is not so and ValueError for a name that is none.
    """
    wanted = names.canonical(name)
    for shown, path in manifests(root).items():
        if names.canonical(shown) == wanted:
            model = read_manifest(root, shown, path)
            if (sentence := model.missing()) is not None:
                raise NotStored(sentence)
            return model
    raise NotStored(f"{names.display(name)} is not in the store {root}; pull it first")


def manifests(root: Path) -> dict[str, Path]:
    """Return the manifests' paths by the names that Ollama shows, without opening any.

    Files whose path is no model's name are left out, as Ollama does. Raises NotStored if the store cannot
    be read.
    """
    found: dict[str, Path] = {}
    keys: set[str] = set()
    for directory in _MANIFEST_DIRECTORIES:
        for path in _four_below(root / directory):
            host, namespace, model, tag = path.parts[-4:]
            host = names.DEFAULT_HOST if host.lower() in _PUBLIC_HOSTS else host
            try:
                name = names.parse(f"{host}/{namespace}/{model}:{tag}")
            except ValueError:
                continue
            if name.key not in keys:
                keys.add(name.key)
                found[name.display] = path
    return found


def read_manifest(root: Path, name: str, path: Path) -> StoredModel:
    """Return the model ``name`` whose manifest is at ``path``. Raises NotStored if that is not usable."""
    raw, modified_at = _read_manifest_file(root, name, path)
    manifest = _runnable(root, name, _manifest_object(name, raw))
    config = manifest.get("config") or {}
    layers = manifest.get("layers") or []
    try:
        entries = [_layer(layer) for layer in layers]
        config_digest = _hex(config["digest"]) if config.get("digest") else ""
        config_bytes = int(config.get("size") or 0)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise NotStored(f"{name}: its manifest has a layer that is none ({error}); pull it again") from error
    return StoredModel(
        root=root,
        name=name,
        digest=hashlib.sha256(raw).hexdigest(),
        size_bytes=sum(layer.size_bytes for layer in entries) + config_bytes,
        modified_at=modified_at,
        config_digest=config_digest,
        layers=tuple(entries),
    )


def _read_manifest_file(root: Path, name: str, path: Path) -> tuple[bytes, datetime]:
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise NotStored(f"{name}: its manifest leads out of the store {root}")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
            raise NotStored(f"{name}: its manifest is no file of at most {MAX_MANIFEST_BYTES} bytes")
        return path.read_bytes(), datetime.fromtimestamp(found.st_mtime, UTC)
    except OSError as error:
        raise NotStored(f"{name}: its manifest {_why(error)}") from error


def _manifest_object(name: str, raw: bytes | str) -> dict[str, Any]:
    found = _parsed(raw)
    if not isinstance(found, dict):
        raise NotStored(f"{name}: its manifest is no JSON object; pull it again")
    return found


def _runnable(root: Path, name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    # Newer Ollama may store one name for several engines; the child is given in place or by its digest.
    if manifest.get("mediaType") != _MANIFEST_LIST:
        return manifest
    children = [child for child in manifest.get("manifests") or [] if isinstance(child, dict)]
    for runner in _RUNNERS:
        for child in children:
            if str(child.get("runner") or "").lower() != runner:
                continue
            if not child.get("digest"):
                return child
            try:
                path = _blob_path(root, _hex(child["digest"]))
            except ValueError as error:
                raise NotStored(f"{name}: its manifest is damaged ({error}); pull it again") from error
            return _manifest_object(name, _read_text(path, name))
    raise NotStored(f"{name}: none of its {len(children)} variants is for llama.cpp")


def _layer(entry: Mapping[str, Any]) -> Layer:
    kind = str(entry["mediaType"]).removeprefix(_LAYER_TYPE)
    return Layer(kind, _hex(entry["digest"]), int(entry["size"]), str(entry.get("from") or ""))


def _hex(digest: object) -> str:
    found = _DIGEST.fullmatch(str(digest))
    if found is None:
        raise ValueError(f"{str(digest)[:80]!r} is no sha256 digest")
    return found[1].lower()


def _blob_path(root: Path, digest: str) -> Path:
    # Ollama before v0.1.33 wrote a colon and renames what it finds when it starts (server/fixblobs.go).
    older = root / "blobs" / f"sha256:{digest}"
    path = root / "blobs" / f"sha256-{digest}"
    return older if not _exists(path) and _exists(older) else path


def _read_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        reason = "is missing; pull it again" if isinstance(error, FileNotFoundError) else _why(error)
        raise NotStored(f"{name}: its layer {path.name} {reason}") from error
    if len(raw) > MAX_TEXT_BYTES:
        raise NotStored(f"{name}: its layer {path.name} has more than {MAX_TEXT_BYTES} bytes of text")
    return raw.decode("utf-8", "replace")


def _four_below(top: Path) -> Iterator[Path]:
    # Four levels and no deeper: neither a stray directory nor a loop of links leads further.
    level = [top]
    for depth in range(4):
        level = [entry for directory in level for entry in _entries(directory, must_be_readable=depth == 0)]
        if depth < 3:
            level = [entry for entry in level if entry.is_dir()]
    yield from (path for path in level if not path.is_dir())


def _entries(directory: Path, *, must_be_readable: bool) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if must_be_readable:
            raise NotStored(f"the store {directory.parent} {_why(error)}") from error
        return []


def _why(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "may not be read by this user: run as the user ollama, or join its group"
    return f"cannot be read: {error.strerror or error}"


def _parsed(text: bytes | str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # up to Python 3.13 a directory that may not be entered raises
        return False


def _listed(directory: Path, pattern: str) -> list[Path]:
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        # A backslash at a line's end joins it with the next (systemd.syntax(7)).
        return path.read_text(errors="replace").replace("\\\n", " ").splitlines()
    except OSError:
        return []


def _words(assigned: str) -> list[str]:
    try:
        return shlex.split(assigned)
    except ValueError:  # a quotation that does not end
        return []


def _unquoted(value: str) -> str:
    return value.strip(" \t\"'")
