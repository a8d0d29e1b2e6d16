"""What is written down of requests that have ended: soon, all of it, and by each listener for itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mitmproxy import http
from mitmproxy.test.tflow import tflow

from proxy_addon import defects, record
from proxy_addon.dispatch import Dispatch
from proxy_addon.epilogue import Epilogue
from proxy_addon.record import Record

NOBODY = cast(Dispatch, SimpleNamespace(now=lambda: 1.0, release=lambda *_: None))


def ended(number: int) -> http.HTTPFlow:
    flow = tflow(resp=True)
    record.open_for(flow, "native", float(number))
    return flow


async def test_no_answer_waits_for_what_is_written_down_of_it() -> None:
    told: list[tuple[str, float]] = []

    def listener(name: str) -> Any:
        return lambda rec: told.append((name, rec.started_s))

    epilogue = Epilogue(NOBODY, lambda node: None, (listener("journal"), listener("metrics")))
    for number in (1, 2):
        epilogue.response(ended(number))
    assert told == []
    await asyncio.sleep(0)
    assert told == [("journal", 1.0), ("journal", 2.0), ("metrics", 1.0), ("metrics", 2.0)]
    epilogue.error(ended(3))
    await asyncio.sleep(0)
    assert told[4:] == [("journal", 3.0), ("metrics", 3.0)]


async def test_a_listener_that_fails_for_one_keeps_nothing_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []
    reported: list[str] = []

    def broken(rec: Record) -> None:
        if rec.started_s == 1.0:
            raise ValueError("a defect")
        told.append(rec.started_s)

    monkeypatch.setattr(defects, "report", lambda defect, where, request_id: reported.append(str(defect)))
    epilogue = Epilogue(NOBODY, lambda node: None, (broken, lambda rec: told.append(-rec.started_s)))
    for number in (1, 2):
        epilogue.response(ended(number))
    await asyncio.sleep(0)
    assert (told, reported) == ([2.0, -1.0, -2.0], ["a defect"])
