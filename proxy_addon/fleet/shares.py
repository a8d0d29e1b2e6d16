"""What several proxies have in flight on one node, told and heard over a connection to its agent.

Whatever another proxy has there counts like our own: a :class:`Flight` of the node that is ``foreign``. So a
slot that it takes, a load that it has begun and the memory that this will need are seen by every decision.
The connection is the share: when either end is gone, so is what it told.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping

import aiohttp
import orjson
from aiohttp import WSMsgType
from pydantic import ValidationError
from yarl import URL

from agent import in_flight
from agent.in_flight import HEARTBEAT_S, LONGEST_BYTES, PACE_S, News, Patch, Row
from proxy_addon.ask import Ask, num_ctx_of
from proxy_addon.endpoints import match
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.fleet.polls import Http
from proxy_addon.placement.runner import runs_under

log = logging.getLogger(__name__)

ALONE_PACE_S = 1.0  #: between two messages where nobody else hears them: they are for the agent's metrics
REFUSED_PAUSE_S = 30.0  #: until it is tried again where the agent does not want it, or is too old for it
#: HTTP status of the agent → what the user may do about it.
WHY = {
    401: "its token is another one than agent_token here",
    403: "from another machine that takes its token: set the same agent_token here and there",
    503: "too many proxies share it already",
}
LINE = "line "  #: begins the id of a row that tells of a line; others are numbers
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.-]")


def row_of(flight: Flight, now_s: float) -> Row:
    """What others are told of ``flight``."""
    ask = flight.ask
    return Row.model_construct(
        path=ask.endpoint.path,
        model=ask.key,
        options=dict(ask.reload_key),
        stream=ask.stream,
        kind=ask.kind,
        max_tokens=ask.max_tokens,
        age_s=max(now_s - flight.started_s, 0.0),
        answering_s=None if flight.first_byte_s is None else max(now_s - flight.first_byte_s, 0.0),
        expected_s=max(flight.expected_s, 0.0),
        service_s=flight.service_s,
        loads=flight.load,
        evicts=flight.evicts,
        need_bytes=flight.need_bytes,
    )


def flight_of(node: Node, row: Row, now_s: float) -> Flight | None:
    """The flight that ``row`` tells of; None for an endpoint that only a later version knows."""
    endpoint = match(row.path)
    if endpoint is None:
        return None
    reload_key = tuple(sorted(row.options.items()))
    ask = Ask(
        endpoint,
        row.model,
        row.model,
        row.stream,
        num_ctx_of(reload_key),
        reload_key,
        max_tokens=row.max_tokens,
        kind=row.kind,  # type: ignore[arg-type]  # one that is not known has no lengths of its own
    )
    started_s = now_s - row.age_s
    first_byte_s = None if row.answering_s is None else now_s - row.answering_s
    return Flight(
        node,
        ask,
        started_s,
        row.expected_s,
        first_byte_s,
        row.loads,
        row.service_s,
        row.evicts,
        row.need_bytes,
        foreign=True,
    )


class Told:
    """What of a node's own flights has changed since it was told last."""

    def __init__(self, node: Node, fleet: Fleet) -> None:
        self._node = node
        self._fleet = fleet
        self._line: dict[str, int] = {}  # as it was told
        self._ids: dict[Flight, str] = {}  # of those that were told
        self._changed: dict[Flight, None] = dict.fromkeys(f for f in node.flights if not f.foreign)
        self._last = 0

    def changed(self, flight: Flight) -> None:
        """``flight`` was taken, answered or dropped."""
        self._changed[flight] = None

    def patch(self, now_s: float) -> Patch:
        """All of it; what came and went meanwhile is not mentioned."""
        patch: Patch = {}
        for flight in self._changed:
            id_ = self._ids.get(flight)
            if flight in self._node.flights:
                if id_ is None:
                    self._last += 1
                    id_ = self._ids[flight] = str(self._last)
                patch[id_] = row_of(flight, now_s)
            elif id_ is not None:
                del self._ids[flight]
                patch[id_] = None
        self._changed.clear()
        patch.update(self._line_patch())
        return patch

    def _line_patch(self) -> Patch:
        """What has changed of the line before the fleet, as far as it is for models that this node has."""
        line = {key: priority for key, priority in self._fleet.line.items() if key in self._node.models}
        before, self._line = self._line, line
        gone: Patch = {f"{LINE}{key}": None for key in before.keys() - line.keys()}
        return gone | {
            f"{LINE}{key}": Row.model_construct(path="", model=key, waits=priority)
            for key, priority in line.items()
            if before.get(key) != priority
        }


def hear(node: Node, fleet: Fleet, news: News, now_s: float) -> None:
    """Take over what other proxies have on ``node`` by now."""
    for id_, row in news.rows.items():
        known = node.foreign.get(id_)
        if row is None:
            node.miss(id_, now_s)
            fleet.lines.pop(f"{node.name} {id_}", None)
        elif row.waits is not None:
            fleet.lines[f"{node.name} {id_}"] = row.model, row.waits
        elif known is None:
            flight = flight_of(node, row, now_s)
            if flight is not None:
                key, loads = flight.ask.key, flight.load
                node.see(id_, flight, now_s)
                node.loaded_with[key] = runs_under(node.loaded_with.get(key), flight.ask.reload_key, loads)
                fleet.seen(flight.ask)
        elif known.first_byte_s is None and row.answering_s is not None:
            node.advance(now_s)
            known.first_byte_s = now_s - row.answering_s


class Share:
    """One node's connection. :meth:`keep` opens it, again where it was lost."""

    def __init__(self, node: Node, fleet: Fleet, http: Http, proxy_id: str, timeout_s: float) -> None:
        self._node = node
        self._fleet = fleet
        self._http = http
        # A node may be known under two addresses, and then is two nodes to this proxy, which see each other.
        self._name = f"{proxy_id}.{_NOT_IN_A_NAME.sub('-', node.name)}"[:64]
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None
        self._not_before_s = 0.0
        self._said: str | None = None

    def keep(self, agent_url: str, headers: Mapping[str, str]) -> None:
        """See to it that the agent at ``agent_url`` is connected, or is being tried."""
        running = self._task is not None and not self._task.done()
        if not running and asyncio.get_running_loop().time() >= self._not_before_s:
            url = (URL(agent_url) / in_flight.PATH.lstrip("/")).with_query(proxy=self._name)
            self._task = asyncio.create_task(self._run(url, headers), name=f"share {self._node.name}")

    def drop(self) -> asyncio.Task[None] | None:
        """End it; the task that is still ending, for who wants to wait."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _run(self, url: URL, headers: Mapping[str, str]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                connecting = self._http().ws_connect(
                    url, headers=headers, heartbeat=HEARTBEAT_S, max_msg_size=LONGEST_BYTES
                )
                async with connecting as socket:
                    limit.reschedule(None)
                    self._said = None
                    await self._share(socket)
        except aiohttp.WSServerHandshakeError as error:
            self._not_before_s = loop.time() + REFUSED_PAUSE_S
            self._say(error.status)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("The connection to %s was lost: %s.", url, error)  # polls say whether it is there
        except ValidationError as error:
            self._not_before_s = loop.time() + REFUSED_PAUSE_S
            log.warning("The agent of %s tells nonsense of other proxies: %s.", self._node.name, error)

    async def _share(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        node, now = self._node, asyncio.get_running_loop().time
        told, changed, company = Told(node, self._fleet), asyncio.Event(), asyncio.Event()
        changed.set()

        def note(flight: Flight) -> None:
            told.changed(flight)
            changed.set()

        node.on_flight = note
        self._fleet.on_line.append(changed.set)
        teller = asyncio.create_task(_tell(socket, told, changed, company), name=f"tell of {node.name}")
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    news = News.model_validate_json(message.data)
                    (company.set if news.others else company.clear)()
                    hear(node, self._fleet, news, now())
        finally:
            teller.cancel()
            node.on_flight = None
            self._fleet.on_line.remove(changed.set)
            for id_ in [id_ for id_ in self._fleet.lines if id_.startswith(f"{node.name} ")]:
                del self._fleet.lines[id_]
            for id_ in list(node.foreign):
                node.miss(id_, now())

    def _say(self, status: int) -> None:
        """Say once why what is in flight on the node is not shared. An agent of before is no news."""
        why = WHY.get(status)
        if status == 403 and self._node.source == "mdns":
            why = "it announced itself, so it is not shown the token; name the node in the configuration"
        if why is not None and why != self._said:
            self._said = why
            log.info(  # where there is one proxy, nothing is lost
                "The agent of %s does not share what several proxies have in flight there: %s.",
                self._node.name,
                why,
            )


async def _tell(
    socket: aiohttp.ClientWebSocketResponse, told: Told, changed: asyncio.Event, company: asyncio.Event
) -> None:
    now = asyncio.get_running_loop().time
    while True:
        await changed.wait()
        changed.clear()
        if patch := told.patch(now()):
            try:
                await socket.send_str(orjson.dumps(in_flight.dumped(patch)).decode())
            except (ConnectionError, aiohttp.ClientError):
                return  # it is gone: whoever reads from it ends
        await asyncio.sleep(PACE_S)
        if not company.is_set():
            try:
                async with asyncio.timeout(ALONE_PACE_S):
                    await company.wait()
            except TimeoutError:
                continue
