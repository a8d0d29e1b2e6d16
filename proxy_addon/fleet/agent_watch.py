"""The polls of one node's agent. Whatever happens to it, the node itself is judged by its Ollama alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from yarl import URL

from agent.report import Report
from proxy_addon.fleet import slots
from proxy_addon.fleet.node import Node
from proxy_addon.fleet.polls import Http, PollFailed, ReportTooNew, fetch, parse_report
from proxy_addon.fleet.shares import Share
from proxy_addon.settings import Settings

log = logging.getLogger(__name__)

AGENT_PORT = 11435
GUESS_EVERY_S = 30.0  #: between two quiet tries at an agent that nobody named


class AgentWatch:
    """Fills ``node.report``, and empties it when the agent is gone.

    The agent's token is sent to whoever stands in for it by configuration, not by announcement. Where nobody
    named an agent, the default port of the node's host is tried now and then; what answers there
    is taken for this node's agent only if it reports on an Ollama with this node's port.
    """

    def __init__(
        self, node: Node, settings: Settings, http: Http, share: Share, on_report: Callable[[Node], None]
    ) -> None:
        self._node = node
        self._share = share
        self._http = http
        self._on_report = on_report
        self._next_guess_s = 0.0
        self._guessed = False
        self._failures = 0
        self._said: str | None = None
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Ask by ``settings`` from now on."""
        self._timeout_s = settings.poll.timeout_s
        self._failures_to_lose = settings.poll.failures_to_lose
        self._guesses = settings.discovery.agents
        self._token = settings.agent_token

    async def look(self) -> None:
        """One round."""
        if self._node.agent_url is None or (self._guessed and self._node.report is None):
            await self._guess()
            return
        try:
            report = await self._fetch(self._node.agent_url)
        except PollFailed as failure:
            self._failed(failure)
        else:
            self._take(report)

    async def _guess(self) -> None:
        now_s = asyncio.get_running_loop().time()
        # A coordinator reports for itself, beside the Ollama API: to ask it there is no guess.
        itself = self._node.kind == "shard"
        if not itself and (not self._guesses or now_s < self._next_guess_s):
            return
        self._next_guess_s = now_s + GUESS_EVERY_S
        port = self._node.port if itself else AGENT_PORT
        url = str(URL.build(scheme="http", host=self._node.host, port=port))
        try:
            report = await self._fetch(url)
        except ReportTooNew as failure:
            self._say(f"The agent at {url} {failure.reason}; {self._node.name} is watched without it.")
        except PollFailed:
            return  # most nodes have none
        else:
            if itself or URL(report.ollama.url).port == self._node.port:
                self._node.agent_url, self._guessed = url, True
                self._take(report)

    async def _fetch(self, url: str) -> Report:
        body = await fetch(self._http, URL(url) / "v1/report", self._timeout_s, headers=self._headers())
        return parse_report(body)

    def _headers(self) -> dict[str, str]:
        if self._token is None or self._node.source == "mdns":  # anybody can announce anything
            return {}
        return {"Authorization": f"Bearer {self._token.get_secret_value()}"}

    def _take(self, report: Report) -> None:
        node = self._node
        if node.report is None:
            log.info("%s has an agent at %s, version %s.", node.name, node.agent_url, report.agent_version)
        node.report = report
        slots.reported(node, report.ollama.num_parallel)
        node.report_s = asyncio.get_running_loop().time()
        self._failures = 0
        self._said = None
        if node.agent_url is not None:
            self._share.keep(node.agent_url, self._headers())
        self._on_report(node)

    def _failed(self, failure: PollFailed) -> None:
        self._failures += 1
        if not failure.at_once and self._failures < self._failures_to_lose:
            return
        self._node.report = None
        self._say(
            f"The agent at {self._node.agent_url} {failure.reason}; {self._node.name} is watched without it."
        )

    def _say(self, sentence: str) -> None:
        if sentence != self._said:
            self._said = sentence
            log.warning(sentence)
