"""A defect in a hook ends as a clear error with a request id, is logged once and counted."""

from __future__ import annotations

import logging

import aiohttp
import pytest

from proxy_addon.answer import Answer
from proxy_addon.failover import Failover
from proxy_addon.guard import Guard
from proxy_addon.intake import Intake, Understand
from proxy_addon.route import Route
from proxy_addon.timeouts import Timeouts
from tests.fakes.faults import rst
from tests.fakes.fixtures import NodeFactory
from tests.proxy.asks import BY_NAME, Way, ask
from tests.proxy.running import RunningProxy

PROMPT = "[[id:boom]]"
HOOKS = [
    (Intake, "requestheaders"),
    (Guard, "requestheaders"),
    (Understand, "request"),
    (Route, "request"),
    (Timeouts, "request"),
    (Answer, "responseheaders"),
    (Failover, "sollol_failure"),
]


@pytest.mark.parametrize("way", [BY_NAME["chat"], BY_NAME["openai"], BY_NAME["anthropic-whole"]], ids=str)
@pytest.mark.parametrize(("addon", "hook"), HOOKS)
async def test_an_exception_in_a_hook_is_a_500_in_the_clients_protocol(
    ollama_node: NodeFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    addon: type,
    hook: str,
    way: Way,
) -> None:
    def broken(self: object, subject: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(addon, hook, broken)
    node = await ollama_node()
    node.fail(*([rst("before_head", path=way.path)] if hook == "sollol_failure" else []))
    async with RunningProxy([node]) as proxy, aiohttp.ClientSession() as session:
        with caplog.at_level(logging.ERROR):
            heard = await ask(session, proxy.url, way, PROMPT)
        text = proxy.sollol.telemetry.expose("")[0].decode()  # a page would meet the same defect
    assert heard.status == 500
    assert heard.error and "SOLLOL failed" in heard.error
    assert f'sollol_hook_errors_total{{hook="{hook}"}} 1.0' in text
    assert sum("a defect" in str(entry.exc_info) for entry in caplog.records) == 1
