"""Files that stock llama.cpp refuses are refused before; what it loads is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent import llama_cpp
from shard.gguf import Header, Tensor, read_header
from shard.loadable import PINNED_BUILD, refusal
from shard.models import demo_model_path
from tests.shard import headers
from tests.shard.projection import Refused, project, rpc_servers

Write = Callable[[Path], Path]


def variant(model: headers.Model, **outside: tuple[int, ...]) -> headers.Model:
    """The model with tensors beside its own; ``__`` stands for a dot."""
    named = {name.replace("__", "."): shape for name, shape in outside.items()}
    return replace(model, outside=dict(model.outside) | named)


def renamed(model: headers.Model, old: str, new: str) -> headers.Model:
    """The model with ``old`` in its blocks' tensor names replaced."""

    def block(of: headers.Model, layer: int) -> headers.Dimensions:
        return {name.replace(old, new): shape for name, shape in model.block(of, layer).items()}

    return replace(model, block=block)


GEMMA, NEXT = headers.GEMMA_3_27B, headers.QWEN3_NEXT_80B

# Each is written as Ollama's converters write it; llama-server itself has to refuse it too.
OLLAMA_FORMATS: dict[str, tuple[Write, str]] = {
    "an embedded vision tower": (
        lambda path: headers.write(path, variant(GEMMA, v__blk__0__attn_q__weight=(1152, 1152))),
        "(v.blk.0.attn_q.weight, 1 in all) into the model's own file",
    ),
    "an embedded draft": (
        lambda path: headers.write(path, variant(NEXT, mtp__fc__weight=(4096, 2048))),
        "mtp.fc.weight",
    ),
    "a missing epsilon": (
        lambda path: headers.write(path, GEMMA, without=("attention.layer_norm_rms_epsilon",)),
        "lacks gemma3.attention.layer_norm_rms_epsilon",
    ),
    "another name for gpt-oss": (
        lambda path: headers.write(path, replace(headers.GPT_OSS_120B, architecture="gptoss")),
        "wrote it as gptoss, where stock llama.cpp expects gpt-oss",
    ),
    "another name for OLMo 3": (
        lambda path: headers.write(path, replace(headers.OLMO_3_32B, architecture="olmo3")),
        "expects olmo2",
    ),
    "another name for a state tensor": (
        lambda path: headers.write(path, renamed(NEXT, "ssm_dt.bias", "ssm_dt")),
        "looks for ssm_dt.bias",
    ),
    "another name for the last norm": (
        lambda path: headers.write(path, replace(headers.LFM2_1_2B, output_norm="output_norm.weight")),
        "looks for token_embd_norm.weight",
    ),
    "embeddinggemma": (
        lambda path: headers.write(path, variant(GEMMA, dense__0__weight=(768, 3072))),
        "looks for dense_2.weight",
    ),
    "more tokens than rows": (
        lambda path: headers.write(path, replace(headers.LLAMA_3_2_1B, vocab=300), tokens=364),
        "its tokenizer has 364 tokens and token_embd.weight 300 rows",
    ),
    "an architecture that is not known": (
        lambda path: headers.write(path, replace(headers.LLAMA_3_2_1B, architecture="thisone")),
        "does not know the architecture thisone",
    ),
}


@pytest.fixture(scope="module")
def endpoints() -> Iterator[list[str]]:
    """One rpc-server that stays empty."""
    with rpc_servers(1) as found:
        yield found


@pytest.mark.parametrize("case", OLLAMA_FORMATS)
def test_what_llama_server_refuses_is_refused_before(case: str, tmp_path: Path, endpoints: list[str]) -> None:
    write, reason = OLLAMA_FORMATS[case]
    path = write(tmp_path / "sha256-0a1b")
    sentence = refusal(read_header(path))
    assert sentence and sentence.startswith("sha256-0a1b cannot be sharded: ") and reason in sentence
    assert "\n" not in sentence
    with pytest.raises(Refused, match="failed to load model"):
        project(path, endpoints, (1,), 512, 32)


@pytest.mark.parametrize(
    "model",
    [model for model in vars(headers).values() if isinstance(model, headers.Model)],
    ids=lambda model: f"{model.architecture}-{model.layers}",
)
def test_published_models_are_not_refused(model: headers.Model, tmp_path: Path) -> None:
    assert refusal(read_header(headers.write(tmp_path / "m.gguf", model))) is None


def test_a_tokenizer_that_fits_is_not_refused(tmp_path: Path, endpoints: list[str]) -> None:
    path = headers.write(tmp_path / "m.gguf", replace(headers.LLAMA_3_2_1B, vocab=300), tokens=300)
    assert refusal(read_header(path)) is None
    assert project(path, endpoints, (1,), 512, 32)["RPC0"].model_mib > 0


def test_the_demo_model_is_not_refused(tmp_path: Path) -> None:
    path = demo_model_path(tmp_path)
    assert path is not None
    assert refusal(read_header(path)) is None


def test_a_file_that_is_no_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    headers.write(path, headers.LLAMA_3_2_1B, beside={"general.name": "Llama"})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    sentence = refusal(read_header(path))
    assert sentence and sentence.startswith("Llama (m.gguf) cannot be sharded: the file ends at byte")
    headers.write(path, headers.LLAMA_3_2_1B, beside={"split.count": 3})
    assert "it is one of 3 parts; join" in str(refusal(read_header(path)))
    headers.write(path, replace(headers.LLAMA_3_2_1B, architecture="clip"))
    assert "it is no model of its own but a projector" in str(refusal(read_header(path)))
    headers.write(path, headers.LLAMA_3_2_1B, beside={"general.type": "adapter"})
    assert "but an adapter" in str(refusal(read_header(path)))


def test_what_only_the_pinned_build_does_not_know_is_left_to_others() -> None:
    unknown = Header(Path("m.gguf"), 9, {"general.architecture": "thisone"}, ())
    assert "does not know the architecture thisone" in str(refusal(unknown))
    assert refusal(unknown, "0badbee") is None

    def typed(kind: int) -> Header:
        tensor = Tensor("token_embd.weight", (32, 2), kind, 0)
        return Header(Path("m.gguf"), 9, {"general.architecture": "llama"}, (tensor,))

    assert "has the type 99, which" in str(refusal(typed(99)))
    assert refusal(typed(99), "0badbee") is None
    for build in (PINNED_BUILD, "0badbee"):
        assert "has the type Q4_0_4_4, which ggml no longer has" in str(refusal(typed(31), build))


def test_the_list_of_architectures_is_that_of_the_pinned_build() -> None:
    program = llama_cpp.program("llama-server")
    assert program is not None
    assert program.build == PINNED_BUILD
