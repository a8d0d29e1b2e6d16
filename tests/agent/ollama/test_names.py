"""Names: what Ollama takes for the same model, how it prints it, what it refuses."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.ollama.names import Name, canonical, display, is_cloud, parse


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("gemma3", "registry.ollama.ai/library/gemma3:latest"),
        ("gemma3:270m", "registry.ollama.ai/library/gemma3:270m"),
        ("Mistral:7B", "registry.ollama.ai/library/Mistral:7B"),
        ("me/mine", "registry.ollama.ai/me/mine:latest"),
        ("hf.co/bartowski/Llama-3.2-1B-GGUF:Q4_K_M", "hf.co/bartowski/Llama-3.2-1B-GGUF:Q4_K_M"),
        ("localhost:5000/team/model", "localhost:5000/team/model:latest"),
        ("localhost:5000/team/model:v1", "localhost:5000/team/model:v1"),
        ("https://example.com/ns/model:tag", "example.com/ns/model:tag"),
        ("  gemma3:270m \n", "registry.ollama.ai/library/gemma3:270m"),
        ("qwen3:8b:local", "registry.ollama.ai/library/qwen3:8b"),
        ("qwen3:local", "registry.ollama.ai/library/qwen3:latest"),
        ("gpt-oss:120b:cloud", "registry.ollama.ai/library/gpt-oss:120b-cloud"),
        ("gpt-oss:120b-cloud", "registry.ollama.ai/library/gpt-oss:120b-cloud"),
        ("gpt-oss:cloud", "registry.ollama.ai/library/gpt-oss:cloud"),
        ("_x/_y:_z", "registry.ollama.ai/_x/_y:_z"),
    ],
)
def test_parse_fills_in_what_is_missing(text: str, full: str) -> None:
    assert str(parse(text)) == full
    assert canonical(text) == full.lower()


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("registry.ollama.ai/library/gemma3:latest", "gemma3:latest"),
        ("Registry.Ollama.ai/Library/Gemma3", "Gemma3:latest"),
        ("registry.ollama.ai/me/mine:v1", "me/mine:v1"),
        ("hf.co/library/x:y", "hf.co/library/x:y"),
    ],
)
def test_display_leaves_out_default_host_and_namespace(text: str, short: str) -> None:
    assert display(text) == short


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "model is required"),
        ("  ", "model is required"),
        ("gemma3:", "the tag is empty"),
        (":270m", "the model is empty"),
        ("/gemma3", "the namespace is empty"),
        ("//gemma3", "the host is empty"),
        ("a/b/c/d", "'a/b' is not a valid host"),
        ("-gemma3", "'-gemma3' is not a valid model"),
        ("ge mma3", "'ge mma3' is not a valid model"),
        ("gemma3\n:x", "is not a valid model"),
        ("gemma3:2\u00e9", "is not a valid tag"),
        ("my.space/gemma3", "'my.space' is not a valid namespace"),
        ("gemma3@sha256", "is not a valid model"),
        ("x" * 81, "the model is longer than 80 characters"),
        ("h" * 351 + "/n/m", "the host is longer than 350 characters"),
        (" " * 1024 + "gemma3", "longer than 1024 characters"),
        ("x" * 2000, f"invalid model name '{'x' * 40}…': longer"),
        ("qwen3:cloud:local", "use either :local or :cloud"),
        ("qwen3:8b-cloud:local", "use either :local or :cloud"),
    ],
)
def test_parse_refuses_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(text)


def test_longest_allowed_lengths_are_accepted() -> None:
    assert parse("h" * 350 + "/" + "n" * 80 + "/" + "m" * 80 + ":" + "t" * 80).tag == "t" * 80


@pytest.mark.parametrize(
    ("text", "cloud"),
    [
        ("gpt-oss:120b-cloud", True),
        ("gpt-oss:120B-CLOUD", True),
        ("gpt-oss:cloud", True),
        ("gpt-oss:120b:cloud", True),
        ("my-cloud", False),
        ("gpt-oss:120b", False),
        ("gpt-oss:cloud/model", False),
        ("host:80-cloud/ns/model", False),
        ("", False),
        ("gpt-oss:local", False),
    ],
)
def test_is_cloud(text: str, cloud: bool) -> None:
    assert is_cloud(text) is cloud


_first = "[A-Za-z0-9_]"


@given(
    st.builds(
        Name,
        st.from_regex(rf"\A{_first}[A-Za-z0-9_.-]{{0,20}}(:[0-9]{{1,5}})?\Z"),
        st.from_regex(rf"\A{_first}[A-Za-z0-9_-]{{0,20}}\Z"),
        st.from_regex(rf"\A{_first}[A-Za-z0-9_.-]{{0,20}}\Z"),
        st.from_regex(rf"\A{_first}[A-Za-z0-9_.-]{{0,20}}\Z").filter(lambda tag: tag.lower() != "local"),
    )
)
def test_both_forms_of_a_name_read_back_as_the_same_model(name: Name) -> None:
    assert parse(str(name)) == name
    assert parse(name.display).key == name.key
    assert canonical(name.key) == name.key == canonical(str(name).upper())


@given(st.text())
def test_any_text_is_a_name_or_a_clear_refusal(text: str) -> None:
    try:
        name = parse(text)
    except ValueError as error:
        assert str(error) == "model is required" or str(error).startswith("invalid model name ")
    else:
        assert parse(str(name)) == name
