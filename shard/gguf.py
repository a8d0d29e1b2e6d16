"""The header of a GGUF file: metadata and tensor table, read without touching the weights.

The ``gguf`` package's reader builds an object for every vocabulary entry (14 s for Gemma's 262,144 tokens,
measured); this one walks the same bytes in place and keeps arrays only where somebody asks for them.
Format: ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
DEEPEST = 8  #: arrays within arrays; the format sets no limit, and nobody writes even one within another

# Value type → struct code (docs/gguf.md, gguf_metadata_value_type).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_READERS = {code: struct.Struct("<" + letter) for code, letter in _SCALARS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# general.file_type → the name Ollama prints (llama.h, enum llama_ftype).
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip


class GgufError(ValueError):
    """The file is no GGUF that can be read; the message is one sentence that names the file."""


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """Stands for an array whose items were not kept."""

    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int

    @property
    def elements(self) -> int:
        """Number of parameters in the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF says of itself. Arrays longer than ``keep_items`` are :class:`SkippedArray`."""

    path: Path
    size_bytes: int
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    #: Where the weights begin; a tensor's offset counts from here.
    data_offset_bytes: int = 0

    @property
    def architecture(self) -> str:
        """``general.architecture``, for example ``gemma3``; "unknown" if the file does not say."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def of_architecture(self, key: str) -> Any:
        """Return ``{architecture}.{key}``, or None if the file does not have it."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def context_length(self) -> int | None:
        """Tokens of context the model was trained for."""
        return self.of_architecture("context_length")  # type: ignore[no-any-return]

    @property
    def embedding_length(self) -> int | None:
        """Width of the residual stream."""
        return self.of_architecture("embedding_length")  # type: ignore[no-any-return]

    @cached_property
    def parameter_count(self) -> int:
        """Sum of all tensors' elements."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def quantisation(self) -> str:
        """The file type as Ollama prints it (``Q4_K_M``); "unknown" where it has no name."""
        return _FILE_TYPES.get(self.metadata.get("general.file_type", -1), "unknown")

    @property
    def chat_template(self) -> str | None:
        """The jinja chat template, None for a base model."""
        return self.metadata.get("tokenizer.chat_template")

    @property
    def is_embedding_model(self) -> bool:
        """Whether the model only embeds: Ollama takes the presence of a pooling type for that."""
        return self.of_architecture("pooling_type") is not None


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, kind: struct.Struct) -> Any:
        value = kind.unpack_from(self.data, self.at)[0]
        self.at += kind.size
        return value

    def raw(self, length: int) -> bytes:
        if self.at + length > len(self.data):
            raise EOFError
        value = self.data[self.at : self.at + length]
        self.at += length
        return value

    def string(self) -> str:
        return self.raw(self.number(_U64)).decode("utf-8", "replace")

    def value(self, kind: int, keep_items: int, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise ValueError
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_READERS[kind])
        item, length = self.number(_U32), self.number(_U64)
        if length <= keep_items:
            return [self.value(item, keep_items, depth + 1) for _ in range(length)]
        if item == _STRING:
            data, at = self.data, self.at
            for _ in range(length):
                at += 8 + _U64.unpack_from(data, at)[0]
            self.at = at
        elif item == _ARRAY:
            for _ in range(length):
                self.value(item, 0, depth + 1)
        else:
            self.at += length * _READERS[item].size
        if self.at > len(self.data):
            raise EOFError
        return SkippedArray(length)


def read_header(path: Path, keep_items: int = 1024) -> Header:
    """Return the header of the GGUF at ``path``, with arrays of up to ``keep_items`` items.

    Raises GgufError if the file is missing, truncated or of another format.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data, keep_items)
    except OSError as error:
        raise GgufError(f"{path}: {error.strerror or error}") from error
    except (struct.error, EOFError, KeyError, ValueError) as error:
        if isinstance(error, GgufError):
            raise
        raise GgufError(f"{path} is not a complete GGUF file") from error


def _read(path: Path, data: mmap.mmap, keep_items: int) -> Header:
    cursor = _Cursor(data)
    if cursor.raw(4) != MAGIC:
        raise GgufError(f"{path} is not a GGUF file")
    version = cursor.number(_U32)
    if version not in (2, 3):
        raise GgufError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    tensor_count, pair_count = cursor.number(_U64), cursor.number(_U64)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number(_U32), keep_items)
    tensors = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number(_U64) for _ in range(cursor.number(_U32)))
        tensors.append(Tensor(name, shape, cursor.number(_U32), cursor.number(_U64)))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError(f"{path} has no usable general.alignment: {str(alignment)[:40]}")
    data_offset_bytes = -(-cursor.at // alignment) * alignment
    return Header(path, len(data), metadata, tuple(tensors), data_offset_bytes)
