"""The agents whose machines may hold layers: who they are, and what they reported last.

They are named (``--agents``) or announce themselves by mDNS. Each is asked for its report every
:data:`POLL_S`, and all of them at once before a plan is made: a plan is only as good as the free memory that
it was made from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError
from yarl import URL

from agent import announce
from agent.report import SCHEMA_VERSION, Report
from agent.sampler import is_here

log = logging.getLogger(__name__)

POLL_S = 2.0
ANSWER_S = 3.0
AGENT_PORT = 11435
#: A report with a thousand models takes 700 kB. Whoever announces himself is asked for one.
LONGEST_REPORT_BYTES = 4 << 20
#: Announcements cost nothing and are believed by asking; no more are kept.
MOST_ANNOUNCED = 256
#: A change of free memory by less is no news: planning goes by larger pieces.
NEWS_BYTES = 256 << 20
#: A report older than this is no ground for a plan.
FRESH_S = 15.0


def agent_url(text: str) -> URL:
    """Return the URL of an agent named as ``HOST``, ``HOST:PORT`` or a URL; ValueError with a sentence."""
    url = URL(text if "://" in text else f"http://{text}")
    if not url.host or url.scheme != "http":
        raise ValueError(f"an agent is named by HOST:PORT, not {text!r}")
    return url if url.explicit_port is not None else url.with_port(AGENT_PORT)


def name_of(url: URL) -> str:
    """Return how a node is called here: its agent's host, with the port where it is not the usual one."""
    host = f"[{url.host}]" if ":" in (url.host or "") else str(url.host)
    return host if url.port == AGENT_PORT else f"{host}:{url.port}"


@dataclass(eq=False)
class Peer:
    """One agent. Times are ``time.monotonic()`` seconds."""

    url: URL
    report: Report | None = None
    reported_at_s: float = float("-inf")
    error: str = "was not asked yet"

    @property
    def name(self) -> str:
        """Its node's name in plans."""
        return name_of(self.url)

    @property
    def host(self) -> str:
        """The address of its machine."""
        return str(self.url.host)

    @property
    def here(self) -> bool:
        """Whether it is this machine's own agent."""
        return is_here(self.url)

    def fresh(self, now_s: float) -> Report | None:
        """Return its report if it is recent enough to plan by."""
        return self.report if now_s - self.reported_at_s <= FRESH_S else None


class Agents:
    """Everyone that may lend memory. Made inside a running loop; closed with :meth:`close`."""

    def __init__(self, named: Iterable[str] = (), *, mdns: bool = False) -> None:
        self._peers = {name_of(url): Peer(url) for url in map(agent_url, named)}
        self._mdns = mdns
        self._announced: dict[str, str] = {}  # node id → name
        self._http = aiohttp.ClientSession(
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=ANSWER_S),
        )
        self.news = (
            asyncio.Event()
        )  #: somebody came, went, or has other memory to lend; whoever waits clears it
        self._task: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def __getitem__(self, name: str) -> Peer:
        return self._peers[name]

    def reports(self, name: str) -> bool:
        """Whether the agent of a node answered when it was asked last."""
        peer = self._peers.get(name)
        return peer is not None and not peer.error

    async def start(self) -> None:
        """Ask everyone once, then go on in the background."""
        if self._mdns:
            try:
                await self._stack.enter_async_context(announce.browse(self._on_announcement))
            except OSError as error:
                log.warning("agents are not looked for by mDNS: %s", error.strerror or error)
        await self.refresh()
        self._task = asyncio.create_task(self._poll(), name="poll agents")

    async def close(self) -> None:
        """Ask nobody any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._stack.aclose()
        await self._http.close()

    async def refresh(self, but: Container[str] = ()) -> None:
        """Ask everyone now, ``but`` those; who does not answer within :data:`ANSWER_S` keeps his report."""
        await asyncio.gather(*(self._ask(peer) for peer in self if peer.name not in but))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.refresh()

    async def _ask(self, peer: Peer) -> None:
        try:
            async with self._http.get(peer.url / "v1/report") as answer:
                if answer.status != 200:
                    raise ValueError(f"its report is answered with {answer.status}")
                body = await _bounded(answer.content)
            report = Report.model_validate_json(body)
        except (aiohttp.ClientError, TimeoutError, ValidationError, ValueError) as error:
            self._failed(peer, _reason(error))
            return
        if report.schema_version > SCHEMA_VERSION:
            self._failed(peer, f"its report has version {report.schema_version}, newer than this one reads")
            return
        if peer.error:
            log.info("%s reports: %s", peer.name, report.host.hostname)
        if peer.error or _lends(report) != _lends(peer.report):
            self.news.set()
        peer.report, peer.reported_at_s, peer.error = report, time.monotonic(), ""

    def _failed(self, peer: Peer, reason: str) -> None:
        if peer.error != reason:
            log.warning("the agent at %s does not report: %s", peer.url, reason)
            self.news.set()
        peer.error = reason

    def _on_announcement(self, node_id: str, node: announce.Announced | None) -> None:
        before = self._announced.get(node_id)
        usable = [address for address in node.addresses if "%" not in address] if node is not None else []
        if before is not None and (node is None or not _is_at(self._peers[before], usable, node.agent_port)):
            del self._announced[node_id]
            del self._peers[before]
        if node is None or node.kind != "ollama" or node_id in self._announced or not usable:
            return
        if {peer.host for peer in self} & set(usable) or len(self._announced) >= MOST_ANNOUNCED:
            return
        peer = Peer(URL.build(scheme="http", host=usable[0], port=node.agent_port))
        self._announced[node_id] = peer.name
        self._peers[peer.name] = peer
        log.info("the agent at %s has announced itself", peer.url)


def _is_at(peer: Peer, addresses: Sequence[str], port: int) -> bool:
    return peer.host in addresses and peer.url.port == port


async def _bounded(stream: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    async for chunk in stream.iter_any():
        body += chunk
        if len(body) > LONGEST_REPORT_BYTES:
            raise ValueError(f"its report is longer than {LONGEST_REPORT_BYTES} bytes")
    return bytes(body)


def _lends(report: Report | None) -> object:
    """What of a report makes plans differ."""
    rpc = report.rpc if report else None
    if rpc is None:
        return None
    devices = [(device.name, device.memory_free_bytes // NEWS_BYTES) for device in rpc.devices]
    return rpc.build, rpc.tunnel_port, rpc.error, devices


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_S:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.os_error.errno or errno.EHOSTUNREACH).lower()
    if isinstance(error, ValidationError):
        return "what answers there is no agent"
    return str(error) or type(error).__name__
