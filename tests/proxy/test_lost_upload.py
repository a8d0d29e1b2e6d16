"""What has no limit of its own ends all the same when its node is gone without a word."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from proxy_addon import timeouts
from tests.fakes.faults import hang
from tests.fakes.fixtures import NodeFactory
from tests.proxy.running import RunningProxy

PATH = f"/api/blobs/sha256:{'0' * 64}"


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
async def test_an_upload_to_a_node_that_is_gone_without_a_word_ends(
    ollama_node: NodeFactory, splice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LOST_SILENT_S", 0.2)
    node = await ollama_node()
    async with RunningProxy([node], splice=splice) as proxy, aiohttp.ClientSession() as session:
        node.fail(hang("mid_body", path=PATH, method="POST"))
        for path in ("/api/ps", "/api/version", "/api/tags"):
            node.fail(hang("before_head", path=path, times=None))
        async with session.post(proxy.url + PATH, data=bytes(1 << 10)) as answer:
            assert answer.status == 503
            assert node.host_port in (await answer.json())["error"]
        assert len(node.requests(PATH, "POST")) == 1
    node.heal()


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "layers"])
async def test_an_upload_to_a_node_that_answers_polls_again_goes_on(
    ollama_node: NodeFactory, splice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LOST_SILENT_S", 0.5)
    node, blob = await ollama_node(), b"twice lost, twice found"
    path = f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"
    async with RunningProxy([node], splice=splice) as proxy, aiohttp.ClientSession() as session:
        (known,) = proxy.sollol.fleet

        async def in_two_parts() -> AsyncIterator[bytes]:
            yield blob[:5]
            await node.wait_received(1, path=path)  # that it is asked whether it has the blob
            for polled in ("/api/ps", "/api/version", "/api/tags"):
                node.fail(hang("before_head", path=polled, times=None))
            await until(lambda: known.poll_error is not None)
            node.heal()
            await until(lambda: known.poll_error is None)
            await asyncio.sleep(2 * timeouts.LOST_SILENT_S)  # it was not ended by then, nor will it be
            yield blob[5:]

        async with session.post(proxy.url + path, data=in_two_parts()) as answer:
            assert answer.status == 201
        assert len(node.requests(path, "POST")) == 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)
