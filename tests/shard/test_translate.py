import base64
from typing import Any

import pytest

from shard.options import resolve
from shard.passthrough import upstream_body
from shard.translate import (
    Refusal,
    chat_body,
    completion_body,
    cut_middle,
    embed_inputs,
    generate_messages,
    infill_body,
    multimodal_prompt,
    shorten,
    shrinking,
    surely_fits,
    tagged_images,
)

OPTIONS = resolve({"num_ctx": 512, "stop": ["x"]}, None)
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def message(**given: Any) -> dict[str, Any]:
    [converted] = chat_body({"messages": [given]}, OPTIONS)["messages"]
    return converted


def test_a_chat_carries_its_sampling_and_always_streams() -> None:
    body = chat_body({"messages": [{"role": "user", "content": "hi"}], "stream": False}, OPTIONS)
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["stream"], body["top_p"], body["stop"], body["n_predict"]) == (True, 0.9, ["x"], 5120)
    assert not {"tools", "logprobs", "response_format", "chat_template_kwargs"} & body.keys()


def test_tool_calls_and_results_take_openais_form() -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}
    assert message(role="assistant", content="", tool_calls=[call])["tool_calls"] == [
        {"id": "c1", "index": 0, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]
    assert message(role="tool", content="7", tool_name="f", tool_call_id="c1") == {
        "role": "tool",
        "content": "7",
        "name": "f",
        "tool_call_id": "c1",
    }


def test_images_become_data_uris_after_the_text() -> None:
    assert message(role="user", content="see", images=[PNG])["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
    ]
    with pytest.raises(Refusal, match="base64"):
        message(role="user", content="see", images=["not base64!"])


@pytest.mark.parametrize(
    ("think", "kwargs"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ],
)
def test_think(think: Any, kwargs: dict[str, Any]) -> None:
    body = chat_body({"messages": [], "think": think}, OPTIONS)
    assert body["chat_template_kwargs"] == kwargs


def test_think_knows_its_levels() -> None:
    with pytest.raises(Refusal, match='invalid think value: "lots"'):
        chat_body({"messages": [], "think": "lots"}, OPTIONS)


def test_earlier_thinking_goes_back_to_the_template() -> None:
    assert message(role="assistant", content="7", thinking="3+4")["reasoning_content"] == "3+4"


def test_format_on_both_routes() -> None:
    schema = {"type": "object"}
    wrapped = {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
    assert chat_body({"messages": [], "format": schema}, OPTIONS)["response_format"] == wrapped
    assert chat_body({"messages": [], "format": "json"}, OPTIONS)["response_format"] == wrapped
    assert completion_body({"format": {"enum": [1]}}, OPTIONS, "")["json_schema"] == {"enum": [1]}
    assert completion_body({"format": "json"}, OPTIONS, "")["json_schema"] == {"type": "object"}
    assert "json_schema" not in completion_body({"format": ""}, OPTIONS, "")


def test_logprobs_on_both_routes() -> None:
    assert chat_body({"messages": [], "logprobs": True}, OPTIONS)["top_logprobs"] == 1
    assert completion_body({"logprobs": True, "top_logprobs": 5}, OPTIONS, "")["n_probs"] == 5
    assert "n_probs" not in completion_body({"top_logprobs": 5}, OPTIONS, "")


def test_generate_becomes_a_conversation_or_a_prompt() -> None:
    assert generate_messages({"prompt": "p", "system": "s"}) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "p"},
    ]
    told = [{"role": "user", "content": "m"}]
    model_s = {"role": "system", "content": "model's"}
    asked = {"role": "user", "content": "p"}
    assert generate_messages({"prompt": "p"}, "model's", told) == [model_s, *told, asked]
    assert generate_messages({"prompt": "p", "context": [1]}, None, told) == [asked]
    assert completion_body({}, OPTIONS, [1, 2])["prompt"] == [1, 2]
    body = infill_body({"prompt": "a", "suffix": "b"}, OPTIONS)
    assert (body["input_prefix"], body["input_suffix"], "prompt" in body) == ("a", "b", False)


def test_embedding_inputs() -> None:
    assert [embed_inputs({"input": given}) for given in ("a", ["a", "b"], "", None, [])] == [
        ["a"], ["a", "b"], [], [], []
    ]  # fmt: skip
    for wrong in (1, [1], {"a": 1}):
        with pytest.raises(Refusal, match="invalid input type"):
            embed_inputs({"input": wrong})


def test_dimensions_shorten_to_a_unit_vector() -> None:
    assert shorten([0.6, 0.0, 0.8], 2) == [1.0, 0.0]
    assert shorten([0.6, 0.8], 5) == shorten([0.6, 0.8], None) == [0.6, 0.8]


def told(*roles: str) -> list[dict[str, Any]]:
    calls = {"tool_calls": [{"function": {"name": "f"}}]}
    return [
        {"role": role.rstrip("!"), "content": str(at)} | (calls if role.endswith("!") else {})
        for at, role in enumerate(roles)
    ]


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        (["user"], ["0"]),
        (["system", "user", "assistant", "user"], ["0123", "023", "03"]),
        (["user", "system", "user"], ["012", "12"]),
        (["system", "user"], ["01"]),
        # The results go with the call that they answer.
        (["user", "assistant!", "tool", "tool", "user"], ["01234", "1234", "4"]),
        (["user", "assistant!", "tool", "tool"], ["0123", "123"]),
        (["user", "assistant", "tool", "user"], ["0123", "123", "23", "3"]),
    ],
)
def test_the_oldest_messages_go_first_and_the_system_never(roles: list[str], kept: list[str]) -> None:
    shrunk = ["".join(message["content"] for message in cut) for cut in shrinking(told(*roles))]
    assert shrunk == kept


@pytest.mark.parametrize(
    ("length", "num_keep", "has_bos", "expected"),
    [
        (9, 4, False, list(range(9))),
        # 10 - (10 - 4) // 2 = 7 tokens: 4 kept from the beginning, 3 from the end.
        (12, 4, False, [0, 1, 2, 3, 9, 10, 11]),
        (12, 4, True, [0, 1, 2, 3, 4, 9, 10, 11]),
        (12, 0, False, [7, 8, 9, 10, 11]),
        (12, -1, False, list(range(9))),
    ],
)
def test_a_prompt_is_cut_in_its_middle(
    length: int, num_keep: int, has_bos: bool, expected: list[int]
) -> None:
    assert cut_middle(range(length), 10, num_keep, has_bos=has_bos) == expected


def test_images_are_tagged_where_they_belong() -> None:
    messages = [
        {"role": "user", "content": "see", "images": [PNG, PNG]},
        {"role": "user", "content": "a [img] b", "images": [PNG]},
    ]
    tagged, images = tagged_images(messages)
    assert [message["content"] for message in tagged] == ["[img-0][img-1]see", "a [img-2] b"]
    assert images == [PNG] * 3
    prompt = multimodal_prompt("[img-0][img-1]see a [img-2] b", images, "<m>")
    assert prompt == {"prompt_string": "<m><m>see a <m> b", "multimodal_data": images}


def test_sound_goes_as_sound_and_webp_is_refused() -> None:
    wav = base64.b64encode(b"RIFF\x10\0\0\0WAVEfmt ").decode()
    assert message(role="user", content="", images=[wav])["content"] == [
        {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}
    ]
    webp = base64.b64encode(b"RIFF\x10\0\0\0WEBPVP8 ").decode()
    with pytest.raises(Refusal, match="WebP images are not supported"):
        message(role="user", content="", images=[webp])


def test_a_conversation_is_counted_only_if_it_may_be_too_long() -> None:
    assert surely_fits([{"content": "a" * 400}], 512)
    assert not surely_fits([{"content": "ä" * 400}], 512)
    assert not surely_fits([{"content": "a", "images": [PNG]}], 512)


def test_passed_through_bodies_start_from_ollamas_defaults() -> None:
    body = upstream_body("/v1/chat/completions", {"model": "m", "top_p": None, "temperature": 0.3}, OPTIONS)
    assert (body["temperature"], body["top_p"], body["min_p"], body["n_predict"]) == (0.3, 1.0, 0.0, 5120)
    assert body["stop"] == ["x"], "the Modelfile's"
    assert "stop" not in upstream_body("/v1/chat/completions", {}, resolve(None, None))
    anthropic = upstream_body("/v1/messages", {"max_tokens": 3, "stop_sequences": ["y"]}, OPTIONS)
    assert (anthropic["temperature"], anthropic["top_p"], "stop" in anthropic) == (0.8, 0.9, False)
    assert "n_predict" not in upstream_body("/v1/chat/completions", {"max_tokens": 4}, OPTIONS)
    assert upstream_body("/v1/embeddings", {"input": "a"}, OPTIONS) == {"input": "a"}
