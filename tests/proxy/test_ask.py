"""What of a request shapes the runner: the reload key."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy_addon.ask import BadRequest, ReloadKey, parse
from proxy_addon.endpoints import match


def key(path: str = "/api/chat", **body: Any) -> ReloadKey:
    endpoint = match(path)
    assert endpoint is not None
    return parse(endpoint, path, {}, orjson.dumps({"model": "llama3.2", **body}), "client").reload_key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ctx", 8192),
        ("num_batch", 64),
        ("num_gpu", 20),
        ("num_gpu", 0),
        ("main_gpu", 1),
        ("num_thread", 4),
        ("use_mmap", False),
    ],
)
def test_every_option_that_makes_ollama_reload_is_in_it(name: str, value: int | bool) -> None:
    assert key(options={name: value}) == ((name, value),)
    assert key("/api/generate", prompt="x", options={name: value}) == ((name, value),)


def test_shift_is_in_it_though_it_is_no_option() -> None:
    assert key(shift=False) == (("shift", False),)
    assert key(shift=True) == ()  # as without it


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.1, "seed": 5, "num_predict": 9, "top_k": 4},
        {"num_gpu": -1},
        {"num_gpu": -7},
        {"main_gpu": 0, "num_thread": 0},
        {"num_ctx": None},
    ],
)
def test_what_reloads_nothing_is_not_in_it(options: dict[str, Any]) -> None:
    assert key(options=options) == key()


def test_neither_order_nor_spelling_of_numbers_makes_a_difference() -> None:
    one = key(options={"num_ctx": 4096, "num_batch": 8}, shift=False)
    other = key(options={"num_batch": 8.0, "num_ctx": 4096.0}, shift=False)
    assert one == other == (("num_batch", 8), ("num_ctx", 4096), ("shift", False))
    assert {one: 1}[other]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_the_other_protocols_have_no_options(path: str) -> None:
    """Ollama's ``/v1`` reads none: what a client puts there reloads nothing."""
    assert key(path, options={"num_ctx": 8192}, max_tokens=1, shift=False) == ()


@pytest.mark.parametrize("options", [{"num_batch": "8"}, {"num_gpu": [1]}, {"use_mmap": 1}, {"num_ctx": 1.5}])
def test_an_option_of_the_wrong_type_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=f"{next(iter(options))} must be "):
        key(options=options)
