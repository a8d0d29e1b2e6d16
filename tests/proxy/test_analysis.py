"""Kind, complexity and GPU need of requests, read from the body in every protocol."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy_addon.analysis import SEARCHED
from proxy_addon.ask import Ask, parse
from proxy_addon.endpoints import match

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def read(path: str, **body: Any) -> Ask:
    endpoint = match(path)
    assert endpoint is not None
    return parse(endpoint, path, {}, orjson.dumps({"model": "llama3.2", **body}), "client")


def chat(*texts: str) -> Ask:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return read("/api/chat", messages=messages)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write a poem about the sea", "generation"),
        ("Classify this ticket: it is broken", "classification"),
        ("please CATEGORISE: apples", "classification"),
        ("Summarize the following.", "summarization"),
        ("tl;dr", "summarization"),
        ("TLDR: what is in it?", "summarization"),
        ("extract all names", "extraction"),
        ("extract a summary and classify it", "classification"),  # the seed's order
        ("the class of classifying extractors", "generation"),  # no whole word
        ("Embed the video in the page", "generation"),  # only an endpoint makes an embedding
        ("", "generation"),
    ],
)
def test_the_kind_is_told_by_words(text: str, kind: str) -> None:
    assert chat(text).kind == kind


def test_the_newest_question_counts_and_no_answer() -> None:
    assert chat("classify this", "I shall summarize it", "now write a poem").kind == "generation"
    assert chat("write a poem", "extract", "classify the poem").kind == "classification"


def test_what_to_do_with_a_document_is_said_at_either_end_of_it() -> None:
    document = "lorem " * SEARCHED
    assert chat(f"Summarize:\n{document}").kind == "summarization"
    assert chat(f"{document}\nSummarize this.").kind == "summarization"
    assert chat(f"{document}\nsummarize\n{document}").kind == "generation"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "summarize it"}]}),
        ("/api/generate", {"prompt": "summarize it", "system": "classify"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "summarize it"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "summarize it"}]}]},
        ),
        ("/v1/completions", {"prompt": "summarize it"}),
        ("/v1/responses", {"input": "summarize it", "instructions": "classify"}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "summarize it"}]}]},
        ),
        (
            "/v1/messages",
            {"system": "classify", "messages": [{"role": "user", "content": "summarize it"}]},
        ),
    ],
)
def test_every_protocol_is_understood(path: str, body: dict[str, Any]) -> None:
    assert read(path, **body).kind == "summarization"


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
def test_embeddings_are_told_by_their_endpoint_and_need_no_gpu(path: str) -> None:
    asked = read(path, input=["classify"] * 500)
    assert (asked.kind, asked.complexity, asked.requires_gpu) == ("embedding", "complex", False)
    assert asked.prefix == ()


@pytest.mark.parametrize(
    ("tokens", "complexity", "requires_gpu"),
    [(99, "simple", False), (100, "medium", True), (499, "medium", True), (500, "complex", True)],
)
def test_complexity_and_gpu_follow_from_the_length(tokens: int, complexity: str, requires_gpu: bool) -> None:
    asked = chat("abcd" * tokens)
    assert asked.prompt_tokens == tokens
    assert (asked.complexity, asked.requires_gpu) == (complexity, requires_gpu)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "see", "images": [PNG, PNG]}]}),
        ("/api/generate", {"prompt": "see", "images": [PNG, PNG]}),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "see"},
                            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                            {"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"},
                        ],
                    }
                ]
            },
        ),
        (
            "/v1/messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "source": {"type": "base64", "data": PNG}},
                            {
                                "type": "tool_result",
                                "content": [{"type": "image", "source": {"type": "base64", "data": PNG}}],
                            },
                        ],
                    }
                ]
            },
        ),
    ],
)
def test_images_are_counted_and_need_a_gpu(path: str, body: dict[str, Any]) -> None:
    asked = read(path, **body)
    assert (asked.images, asked.requires_gpu) == (2, True)
    assert asked.prompt_tokens // 768 == 2  # not by the letters of their base64


def test_token_ids_count_as_what_they_are() -> None:
    assert read("/v1/completions", prompt=[7] * 300).prompt_tokens == 300
    assert read("/v1/embeddings", input=[[7] * 30, [8] * 50]).prompt_tokens == 80
    assert read("/api/generate", prompt="", context=[123456] * 300).prompt_tokens == 300


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ["text", 1, None, [2]]},
        {"messages": [{"role": 5, "content": {"a": [1.5, True]}}, "x"]},
        {"messages": [{"role": "user", "content": "x", "images": "no list"}]},
        {"messages": [{"role": "user", "images": [1, None, {"a": 1}]}]},
        {"messages": [], "tools": [[1, [2]], "x"]},
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": None}}]},
    ],
)
def test_a_body_of_any_shape_is_read_without_a_fault(body: dict[str, Any]) -> None:
    assert read("/api/chat", **body).kind == "generation"


def test_a_very_deep_body_is_read_without_a_fault() -> None:
    endpoint = match("/api/chat")
    assert endpoint is not None
    deep = b"[" * 900 + b'"classify"' + b"]" * 900
    body = b'{"model":"m","messages":[{"role":"user","content":' + deep + b"}]}"
    assert parse(endpoint, "/api/chat", {}, body, "client").kind == "classification"
