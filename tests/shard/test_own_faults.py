"""A fault of the node's own code: the client gets a sentence, the log the traceback, the metrics a count."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.core import Metric

from shard.coordinator import Coordinator
from shard.metrics import collector
from shard.models import Models
from shard.node import NODE, Node, errors
from shard.runners import Runners


async def broken(request: web.Request) -> web.StreamResponse:
    raise ZeroDivisionError("a secret of the request")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"error": "internal error; the node's log says more"}),
        (
            "/v1/chat/completions",
            {
                "error": {
                    "message": "internal error; the node's log says more",
                    "type": "api_error",
                    "param": None,
                    "code": None,
                }
            },
        ),
    ],
)
async def test_it_is_told_logged_and_counted(
    path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(cast(Models, None), cast(Runners, None))
    app = web.Application(middlewares=[errors])
    app[NODE] = node
    app.router.add_post(path, broken)
    async with TestClient(TestServer(app)) as client:
        for _ in range(2):
            async with client.post(path, json={}) as answer:
                assert answer.status == 500
                assert await answer.json() == body
    traced = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(traced) == 2
    assert traced[0].exc_info is not None
    idle = SimpleNamespace(loads=list, plans_made=0, replans_made=0)
    assert value("sollol_shard_errors", list(collector(cast(Coordinator, idle), node)())) == 2


def value(name: str, metrics: list[Metric]) -> float:
    [found] = [metric for metric in metrics if metric.name == name]
    return found.samples[0].value
