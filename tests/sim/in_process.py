"""HTTP without sockets: what the proxy's own watches and probes ask of the simulated nodes and agents."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import WSMessage, WSMsgType
from yarl import URL

from agent.sharing import attend
from proxy_addon.fleet.agent_watch import AGENT_PORT
from tests.fakes.clock import clock_s
from tests.fakes.engine import Generation, Job
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.models_api import ps_row, tags_row
from tests.fakes.native_api import find

if TYPE_CHECKING:
    from tests.sim.world import SimNode


@dataclass(slots=True)
class Reply:
    """An answer, as much of it as is read."""

    status: int
    body: bytes

    @property
    def content(self) -> Reply:
        """Itself: the body's reader."""
        return self

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Yield the whole body."""
        yield self.body


async def _ps(node: SimNode, _: Mapping[str, Any]) -> Any:
    return {"models": [ps_row(runner) for runner in await node.scheduler.resident()]}


async def _tags(node: SimNode, _: Mapping[str, Any]) -> Any:
    return {"models": [tags_row(model) for model in node.store.listing()]}


async def _version(node: SimNode, _: Mapping[str, Any]) -> Any:
    return {"version": node.version}


async def _show(node: SimNode, body: Mapping[str, Any]) -> Any:
    return {"model_info": find(node, body["model"]).model_info(bool(body.get("verbose")))}


async def _generate(node: SimNode, body: Mapping[str, Any]) -> Any:
    options = dict(body["options"])
    limit = options.pop("num_predict")
    job = Job(find(node, body["model"]), body["model"], body["prompt"], options, limit=limit)
    async with Generation(node.scheduler, job) as generation:
        _, text = await generation.whole()
        return {"response": text, "done": True, "done_reason": "length", **generation.stats.fields()}


ROUTES: dict[str, Callable[[SimNode, Mapping[str, Any]], Awaitable[Any]]] = {
    "/api/ps": _ps,
    "/api/tags": _tags,
    "/api/version": _version,
    "/api/show": _show,
    "/api/generate": _generate,
}


LINK_S = 0.002  #: that a message takes from a proxy to an agent or back: a busy local network and event loop


class Socket:
    """One end of a WebSocket: what is sent arrives at the other end a little later."""

    def __init__(self) -> None:
        self._peer: Socket = self
        self._arrived: asyncio.Queue[WSMessage | None] = asyncio.Queue()

    @classmethod
    def pair(cls) -> tuple[Socket, Socket]:
        """Both ends."""
        one, other = cls(), cls()
        one._peer, other._peer = other, one
        return one, other

    async def send_str(self, data: str) -> None:
        """Send a message."""
        message = WSMessage(WSMsgType.TEXT, data, None)
        asyncio.get_running_loop().call_later(LINK_S, self._peer._arrived.put_nowait, message)

    async def close(self, *, code: int = 1000, message: bytes = b"") -> None:
        """End the messages of both."""
        for end in (self, self._peer):
            end._arrived.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[WSMessage]:
        while (message := await self._arrived.get()) is not None:
            yield message


class Session:
    """Stands in for aiohttp's: asks nodes by their address, and their agents beside them."""

    def __init__(self, nodes: Mapping[str, SimNode], agents: Mapping[str, FakeAgent]) -> None:
        self._nodes, self._agents = nodes, agents

    @asynccontextmanager
    async def ws_connect(self, url: URL, **_: Any) -> AsyncIterator[Socket]:
        """Share what is in flight with others that are connected to the same agent."""
        ours, theirs = Socket.pair()
        serving = asyncio.create_task(
            attend(theirs, self._agents[str(url.host)].shares, url.query["proxy"], clock_s)
        )
        try:
            yield ours
        finally:
            await ours.close()
            await serving

    @asynccontextmanager
    async def request(self, method: str, url: URL, **more: Any) -> AsyncIterator[Reply]:
        """Ask, and yield the answer."""
        node = self._nodes[str(url.host)]
        if not node.reachable:
            raise OSError(errno.ECONNREFUSED, "connection refused")
        if url.port == AGENT_PORT:
            yield Reply(200, self._agents[str(url.host)].report().model_dump_json().encode())
            return
        fault = node.server.claim(method, url.path)
        if fault is not None:
            yield Reply(fault.status, orjson.dumps({"error": fault.text}))
            return
        yield Reply(200, orjson.dumps(await ROUTES[url.path](node, more.get("json") or {})))
