"""Builds stores as Ollama writes them: manifests byte for byte, blobs by their digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import gguf

from agent.ollama import names

LAYER_TYPE = "application/vnd.ollama.image."
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"

Layer = dict[str, Any]


class Store:
    """A store under ``root``, written as ``manifest/manifest.go`` and ``manifest/layer.go`` do."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, digest: str) -> Path:
        """The path of the blob with the hex ``digest``."""
        return self.root / "blobs" / f"sha256-{digest}"

    def layer(self, kind: str, content: str | bytes | list[Any] | dict[str, Any], **more: str) -> Layer:
        """Store ``content``, lists and objects as JSON, and return its layer."""
        if isinstance(content, list | dict):
            content = json.dumps(content)
        raw = content.encode() if isinstance(content, str) else content
        digest = hashlib.sha256(raw).hexdigest()
        self.blob(digest).write_bytes(raw)
        return self._entry(LAYER_TYPE + kind, digest, len(raw), more)

    def file(self, kind: str, path: Path, digest: str | None = None, **more: str) -> Layer:
        """Store a large file without copying it; pass its ``digest`` if known, for hashing takes long."""
        digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
        if not self.blob(digest).exists():
            try:
                os.link(path, self.blob(digest))
            except OSError:  # another file system
                self.blob(digest).symlink_to(path)
        return self._entry(LAYER_TYPE + kind, digest, path.stat().st_size, more)

    def write(
        self,
        name: str,
        layers: list[Layer],
        config: dict[str, Any] | None = None,
        under: str = "manifests",
    ) -> Path:
        """Write the manifest of ``name`` and return its path."""
        given = {"architecture": "amd64", "os": "linux"} | (config or {"model_format": "gguf"})
        entry = self.layer("", given) | {"mediaType": CONFIG_TYPE}
        return self.write_raw(name, self.manifest(layers, entry), under)

    def write_raw(self, name: str, raw: bytes, under: str = "manifests") -> Path:
        """Write ``raw`` where the manifest of ``name`` belongs."""
        parts = names.parse(name)
        path = self.root / under / parts.host / parts.namespace / parts.model / parts.tag
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return path

    @staticmethod
    def manifest(layers: list[Layer], config: Layer) -> bytes:
        """Return a manifest as Go's encoder writes it: compact, in the struct's order, with a newline."""
        fields = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers}
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def _entry(media_type: str, digest: str, size: int, more: dict[str, str]) -> Layer:
        taken_from = {"from": more["taken_from"]} if "taken_from" in more else {}
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size} | taken_from


def small_gguf(path: Path, architecture: str = "llama", **metadata: str | int | bool) -> Path:
    """Write a GGUF of a header alone. ``__`` in a key stands for a dot, ``arch__`` for the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Any] = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for key, value in metadata.items():
        adders[type(value)](key.replace("arch__", f"{architecture}.").replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
