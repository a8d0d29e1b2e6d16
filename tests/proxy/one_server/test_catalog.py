from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from agent.report import Model
from proxy_addon.one_server import catalog
from tests.proxy.one_server.build import fleet, model, node, resident, utc

OLD, NEW = "a" * 64, "b" * 64


def rows(body: dict[str, list[dict[str, object]]], *fields: str) -> list[tuple[object, ...]]:
    return [tuple(row[field] for field in fields) for row in body["models"]]


def test_tags_are_the_union_newest_first() -> None:
    nodes = [
        node("10.0.0.1", model("gemma3:270m", day=1), model("llama3.2", day=3)),
        node("10.0.0.2", model("qwen3:8b", day=2), model("gemma3:270m", day=1)),
    ]
    assert rows(catalog.tags(nodes), "name") == [("llama3.2",), ("qwen3:8b",), ("gemma3:270m",)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_row_wins_a_digest_conflict_as_in_routing(order: int) -> None:
    old, new = (
        node("10.0.0.1", model("Gemma3", OLD, day=1)),
        node("10.0.0.2", model("gemma3:latest", NEW, day=2)),
    )
    nodes = [old, new][::order]
    assert rows(catalog.tags(nodes), "name", "digest") == [("gemma3:latest", NEW)]
    assert fleet(*nodes).digest(next(iter(new.models))) == NEW


def test_a_row_passes_unchanged_with_fields_this_code_does_not_know() -> None:
    row = {
        "name": "x:latest",
        "model": "x:latest",
        "modified_at": "2026-08-01T12:00:00.5+02:00",
        "size": 7,
        "digest": OLD,
        "details": {"family": "gemma3", "context_length": 32768, "families": None},
        "capabilities": ["completion"],
        "remote_host": "https://ollama.com:443",
    }
    assert catalog.tags([node("10.0.0.1", Model.model_validate(row))]) == {"models": [row]}


def test_models_of_a_node_that_does_not_answer_are_not_offered() -> None:
    lost = node("10.0.0.1", model("only-there"), poll_error="connection refused")
    assert catalog.tags([lost, node("10.0.0.2")]) == {"models": []}


def test_ps_has_one_row_a_name_that_of_the_replica_that_stays_longest() -> None:
    nodes = [
        node("10.0.0.1", loaded=(resident("a", day=2, size=30, size_vram=15), resident("b", day=3))),
        node(
            "10.0.0.2",
            loaded=(resident("a:latest", day=4, size=20, size_vram=20), resident("c", expires_at=None)),
        ),
    ]
    body = catalog.ps(nodes)
    assert rows(body, "name", "size", "size_vram") == [("a:latest", 20, 20), ("b", 10, 10), ("c", 10, 10)]
    assert body["models"][0]["expires_at"] == "2026-08-04T10:00:00Z"


@pytest.mark.parametrize(
    ("versions", "lowest"),
    [
        (["0.33.0", "0.9.6", "0.24.0"], "0.9.6"),
        (["0.33.0", "0.33.0-rc2"], "0.33.0-rc2"),
        (["0.33.0-rc10", "0.33.0-rc2"], "0.33.0-rc2"),
        (["v0.33.1", "0.33"], "0.33"),
        (["0.33.0+build7", None], "0.33.0+build7"),
        (["0.0.0", "0.1.0"], "0.0.0"),
        ([None], None),
        ([], None),
    ],
)
def test_the_version_is_the_lowest(versions: list[str | None], lowest: str | None) -> None:
    assert catalog.version(versions) == lowest
    assert catalog.version(versions[::-1]) == lowest


def test_missing_parts_of_a_version_are_zero() -> None:
    assert catalog.version_key("0.33") == catalog.version_key("0.33.0")


def test_openai_models_have_openai_fields_and_the_order_of_tags() -> None:
    nodes = [node("10.0.0.1", model("mine/gemma3:1b", day=1), model("llama3.2", day=2))]
    created = int(utc(2026, 8, 1, 10).timestamp())
    assert catalog.openai_models(nodes) == {
        "object": "list",
        "data": [
            {"id": "llama3.2", "object": "model", "created": created + 86400, "owned_by": "library"},
            {"id": "mine/gemma3:1b", "object": "model", "created": created, "owned_by": "mine"},
        ],
    }


def test_openai_writes_null_for_no_models() -> None:
    assert catalog.openai_models([node("10.0.0.1")]) == {"object": "list", "data": None}


@pytest.mark.parametrize(
    ("when", "text"),
    [
        (utc(2026, 8, 1, 12, 0, 0), "2026-08-01T12:00:00Z"),
        (utc(2026, 8, 1, 12, 0, 0, 120000), "2026-08-01T12:00:00.12Z"),
        (utc(2026, 8, 1, 12, 0, 0, 123456), "2026-08-01T12:00:00.123456Z"),
        (datetime(2026, 8, 1, 12, 0, 10, tzinfo=timezone(timedelta(hours=-7))), "2026-08-01T12:00:10-07:00"),
        (utc(1, 1, 1), "0001-01-01T00:00:00Z"),
    ],
)
def test_times_are_written_as_go_writes_them(when: datetime, text: str) -> None:
    assert catalog.go_time(when) == text
