"""The header reader against files written by the reference implementation."""

from pathlib import Path

import gguf
import numpy
import pytest

from shard.gguf import GgufError, Header, SkippedArray, read_header
from shard.models import human_number, open_model
from tests.shard import headers


def write(path: Path, **more: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(8)
    writer.add_file_type(15)
    writer.add_array("some.words", ["a", "bc", "ä"])
    writer.add_array("some.numbers", list(range(2000)))
    writer.add_float32("some.float", 0.5)
    writer.add_bool("some.flag", True)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 8), dtype=numpy.float32))
    writer.add_tensor("output.weight", numpy.zeros((3, 8), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_of_a_written_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tokenizer__chat_template="{{ tools }}<think>")
    header = read_header(path)
    assert (header.architecture, header.context_length, header.embedding_length) == ("llama", 2048, 8)
    assert (header.parameter_count, header.quantisation) == (4 * 8 + 3 * 8, "Q4_K_M")
    assert header.metadata["some.words"] == ["a", "bc", "ä"]
    assert header.metadata["some.numbers"] == SkippedArray(2000)
    assert (header.metadata["some.float"], header.metadata["some.flag"]) == (0.5, True)
    assert [(tensor.name, tensor.shape) for tensor in header.tensors] == [
        ("token_embd.weight", (8, 4)),
        ("output.weight", (8, 3)),
    ]
    assert read_header(path, keep_items=10**6).metadata["some.numbers"] == list(range(2000))
    assert header.size_bytes == path.stat().st_size
    model = open_model("M", path, tmp_path / "state")
    assert model.capabilities == ["completion", "tools", "thinking"]
    assert model.launch({"num_ctx": 1, "num_thread": 0, "num_batch": 1, "num_gpu": -1}, parallel=1,
                        threads=1).chat_template is None  # fmt: skip


@pytest.mark.parametrize("model", [headers.LFM2_1_2B, headers.GPT_OSS_120B, headers.MAMBA_2_8B])
def test_the_header_as_the_reference_reader_has_it(tmp_path: Path, model: headers.Model) -> None:
    path = headers.write(tmp_path / "m.gguf", model, beside={"some.name": "ä", "some.flag": True}, tokens=300)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == {key: field.contents() for key, field in fields.items()}
    assert [
        (t.name, t.shape, t.ggml_type, ours.data_offset_bytes + t.offset_bytes) for t in ours.tensors
    ] == [(t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset)) for t in theirs.tensors]


def test_file_types_are_named_as_the_reference_names_them(tmp_path: Path) -> None:
    named = {"ALL_F32": "F32", "MOSTLY_MXFP4_MOE": "MXFP4"}  # what Ollama prints for them
    for kind in gguf.LlamaFileType:
        if kind.name in ("MOSTLY_NVFP4", "MOSTLY_Q1_0", "GUESSED"):
            continue
        header = Header(tmp_path, 0, {"general.file_type": int(kind)}, ())
        assert header.quantisation == named.get(kind.name, kind.name.removeprefix("MOSTLY_"))


def test_every_cut_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    table_end = whole.index(b"output.weight") + len(b"output.weight") + 4 + 2 * 8 + 4 + 8
    cut = tmp_path / "cut.gguf"
    for length in range(1, table_end, 97):
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError, match="not a complete GGUF file"):
            read_header(cut)
    for content, message in ((b"", "not a complete"), (b"PK\x03\x04", "is not a GGUF file")):
        cut.write_bytes(content)
        with pytest.raises(GgufError, match=message):
            read_header(cut)
    cut.write_bytes(b"GGUF\x01\x00\x00\x00")
    with pytest.raises(GgufError, match="GGUF version 1"):
        read_header(cut)


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    state = tmp_path / "state"
    one = open_model("a", write(tmp_path / "one.gguf"), state)
    (tmp_path / "sub").mkdir()
    two = open_model("a", write(tmp_path / "sub" / "two.gguf"), tmp_path / "other")
    assert one.digest == two.digest and len(one.digest) == 64
    three = open_model("a", write(tmp_path / "one.gguf", more="x"), state)
    assert three.digest != one.digest, "a file that was replaced is hashed again"
    (state / "digests.json").write_bytes(b'{"cut sh')
    assert open_model("a", tmp_path / "one.gguf", state).digest == three.digest


@pytest.mark.parametrize(
    ("count", "text"),
    [(268098176, "268.10M"), (8030261312, "8.0B"), (7_000_000_000, "7B"), (999, "999"), (22_000, "22K")],
)
def test_parameter_counts_read_as_ollama_prints_them(count: int, text: str) -> None:
    assert human_number(count) == text
