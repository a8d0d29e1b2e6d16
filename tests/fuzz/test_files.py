"""Files that others wrote, or that were cut by a crash: read, or refused with the documented error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.ollama.storage import NotStored, models, read_manifest, scan
from proxy_addon.entry import Columns, unpack
from proxy_addon.journal import FILE, PREVIOUS_FILE, parse, read
from proxy_addon.settings import load
from proxy_addon.settings_sources import SettingsError, from_file
from shard.gguf import GgufError, Header, read_header

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples: each overwrites the file of the one before."""
    return tmp_path_factory.mktemp("fuzz")


# -- GGUF --------------------------------------------------------------------------------------------------

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def gguf_string(text: bytes) -> bytes:
    return U64(len(text)) + text


def gguf(*pairs: bytes, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + U32(3) + U64(tensor_count) + U64(len(pairs)) + b"".join(pairs) + tensors


ARCHITECTURE = gguf_string(b"general.architecture") + U32(8) + gguf_string(b"llama")
ALIGNMENT = gguf_string(b"general.alignment")
DEEP = gguf_string(b"deep") + U32(9) + (U32(9) + U64(1)) * 5000 + U32(4) + U64(1) + U32(0)


def read_gguf(folder: Path, data: bytes) -> Header | None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    try:
        return read_header(path)
    except GgufError:
        return None


@given(st.binary(max_size=200))
@example(ARCHITECTURE)
def test_any_bytes_are_a_gguf_or_refused(folder: Path, data: bytes) -> None:
    read_gguf(folder, data)
    read_gguf(folder, b"GGUF" + U32(3) + data)
    read_gguf(folder, gguf(ARCHITECTURE, gguf_string(b"x") + data))


@given(st.integers(0, 14), st.binary(max_size=40))
@example(9, U32(4) + U64(1) + U32(32))  # an array of one number
@example(4, U32(0))
@example(6, struct.pack("<f", float("inf")))
@example(8, gguf_string(b"x"))
def test_an_alignment_of_any_kind_is_used_or_refused(folder: Path, kind: int, value: bytes) -> None:
    header = read_gguf(folder, gguf(ALIGNMENT + U32(kind) + value))
    assert header is None or header.data_offset_bytes >= 0


@pytest.mark.parametrize(
    "pair",
    [DEEP, *(gguf_string(b"a") + U32(9) + U32(kind) + U64(1 << 40) for kind in (4, 8))],
    ids=["deep", "long", "many"],
)  # fmt: skip
def test_a_gguf_that_would_cost_too_much_is_refused(folder: Path, pair: bytes) -> None:
    assert read_gguf(folder, gguf(pair)) is None


@given(st.integers(0, 400))
def test_a_gguf_that_was_cut_is_refused(folder: Path, at: int) -> None:
    row = gguf_string(b"blk.0") + U32(2) + U64(4) + U64(4) + U32(0) + U64(0)
    whole = gguf(
        ARCHITECTURE,
        gguf_string(b"n") + U32(9) + U32(4) + U64(2000) + b"\0" * 8000,
        tensors=row,
        tensor_count=1,
    )
    assert read_gguf(folder, whole) is not None
    assert read_gguf(folder, whole[:-1 - at * len(whole) // 401]) is None  # fmt: skip


# -- manifests ---------------------------------------------------------------------------------------------

DIGEST = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST, "size": 1}


def read_stored(folder: Path, manifest: bytes) -> None:
    path = folder / "manifests" / "registry.ollama.ai" / "library" / "m" / "latest"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    path.write_bytes(manifest)
    try:
        model = read_manifest(folder, "m:latest", path)
        for text in ("template", "system", "params", "messages", "license", "missing", "config", "format"):
            getattr(model, text)
    except NotStored as refused:
        assert str(refused)
    scan(folder)
    models(folder)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_manifest_or_refused(folder: Path, data: bytes) -> None:
    read_stored(folder, data)


@given(
    st.dictionaries(
        st.sampled_from(["layers", "config", "manifests", "schemaVersion", "mediaType"]), json_values
    )
)
def test_any_json_is_a_manifest_or_refused(folder: Path, made: dict[str, Any]) -> None:
    read_stored(folder, json.dumps(made).encode())


layers = st.fixed_dictionaries({key: json_values | st.just(value) for key, value in LAYER.items()})


@given(json_values | layers, st.lists(json_values | layers, max_size=3))
@example(config={**LAYER, "size": float("inf")}, of=[])
def test_layers_of_any_kind_are_read_or_refused(folder: Path, config: Any, of: list[Any]) -> None:
    read_stored(folder, json.dumps({"config": config, "layers": of}).encode())


# -- the journal -------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b'{"columns":{"ask":[1],"node":[]}}\n{"id":1}\n{"id"', b'{"columns":[]}\n\n\n')
def test_a_damaged_journal_is_read_as_far_as_it_goes(folder: Path, data: bytes, before: bytes) -> None:
    (folder / FILE).write_bytes(data)
    (folder / PREVIOUS_FILE).write_bytes(before)
    for columns, line in read(folder):
        entry = parse(line)
        if entry is not None:
            try:
                unpack(entry, columns)
            except ValueError as refused:
                assert str(refused)


@given(json_values)
def test_an_entry_of_any_shape_is_unpacked_or_refused(decisions: Any) -> None:
    for made in (
        {"decisions": decisions},
        {"decisions": [decisions]},
        {"decisions": [{"candidates": decisions}]},
    ):
        try:
            unpack(made, Columns(("a",), ("b",)))
        except ValueError as refused:
            assert str(refused)


# -- settings ----------------------------------------------------------------------------------------------


@given(
    st.text(max_size=80)
    | st.sampled_from(["a: *b", "a: &a [*a]", "? [x]\n: y", "1: 2", "!!python/x a", "\x00"])
)
def test_any_text_is_settings_or_a_sentence(folder: Path, text: str) -> None:
    path = folder / "sollol.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        from_file(path)
        load(path, {})
    except SettingsError as refused:
        assert "\n" not in str(refused)


@given(st.binary(max_size=60))
def test_any_bytes_are_settings_or_a_sentence(folder: Path, data: bytes) -> None:
    path = folder / "sollol.yaml"
    path.write_bytes(data)
    try:
        from_file(path)
    except SettingsError as refused:
        assert "\n" not in str(refused)


@given(
    st.text(max_size=30),
    st.lists(
        st.text(max_size=20)
        | st.sampled_from(["a=1", "timeouts=1", "timeouts.idle_s=x", "a.b.c=1", "nodes.x=1"]),
        max_size=3,
    ),
    st.sampled_from(
        ["SOLLOL_NODES", "SOLLOL_TIMEOUTS", "SOLLOL_TIMEOUTS__IDLE_S", "SOLLOL__", "SOLLOL_LISTEN"]
    ),
)
def test_variables_and_arguments_are_taken_or_refused(value: str, pairs: list[str], name: str) -> None:
    empty = {"XDG_CONFIG_HOME": "/nonexistent", name: value}
    for sets in (pairs, []):
        try:
            load(None, empty, sets)
        except SettingsError as refused:
            assert str(refused)


@given(
    st.dictionaries(
        st.sampled_from(["nodes", "listen", "timeouts", "guard", "clients", "pin", "retry"]), json_values
    )
)
def test_settings_of_any_shape_are_taken_or_refused(folder: Path, values: dict[str, Any]) -> None:
    path = folder / "sollol.yaml"
    path.write_bytes(orjson.dumps(values))
    try:
        load(path, {})
    except SettingsError as refused:
        assert str(refused)
