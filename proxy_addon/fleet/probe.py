"""Tries nodes again that are believed slow or failing, so that no client has to.

Such a node is given no work as long as others can do it, and without work nothing is learned of it. So while
it is idle it is asked for a few tokens now and then, of a model that it has in memory and that clients use,
under the options with which it was loaded: nothing is loaded, reloaded or kept from anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from yarl import URL

from proxy_addon import defects
from proxy_addon.ask import Ask
from proxy_addon.endpoints import match
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.node_watch import cancelled
from proxy_addon.fleet.polls import Http, PollFailed, fetch
from proxy_addon.relay import read_stats

log = logging.getLogger(__name__)

FIRST_S = 15.0  #: of doubt until a node is tried
LONGEST_S = 300.0  #: between two tries that change nothing; they double up to there
LOOK_EVERY_S = 5.0
TIMEOUT_S = 30.0
WANTED_PER_S = 1 / 600  #: a model that clients ask for less often than this is not worth a try
PATH = "/api/generate"
PROMPT = "1 2 3 4"
TOKENS = 8  #: of the answer: enough to tell a speed by, for a slow machine as well
KIND = "probe"  #: of the notes in the journal

Doubt = Literal["slow", "failing"]


@dataclass(slots=True)
class Pause:
    """How long a doubtful node is left alone."""

    next_s: float
    pause_s: float = FIRST_S


@dataclass(slots=True)
class Schedule:
    """Whom to try, and when. Pure: what it knows of time it is told."""

    pauses: dict[str, Pause] = field(default_factory=dict)  #: by the name of the node

    def due(self, nodes: Iterable[Node], speeds: Speeds, now_s: float) -> list[tuple[Node, str, Doubt]]:
        """The nodes to try now, each with the model to ask for and what is suspected."""
        found = []
        doubtful = set()
        for node in nodes:
            doubt = speeds.doubt(node.name, now_s)
            if doubt is None:
                continue
            doubtful.add(node.name)
            pause = self.pauses.setdefault(node.name, Pause(now_s + FIRST_S))
            if now_s >= pause.next_s and _idle(node) and node.up(now_s):
                key = _model(node, speeds, now_s)
                if key is not None:
                    found.append((node, key, doubt))
        for name in self.pauses.keys() - doubtful:
            del self.pauses[name]
        return found

    def tried(self, name: str, now_s: float, hopeful: bool) -> None:
        """The node was tried; ``hopeful``: it did better than it was believed to, and is tried again soon."""
        pause = self.pauses.setdefault(name, Pause(now_s))
        if hopeful:
            pause.next_s, pause.pause_s = now_s, FIRST_S
        else:
            pause.pause_s = min(2 * pause.pause_s, LONGEST_S)
            pause.next_s = now_s + pause.pause_s


class Prober:
    """Carries the schedule out. ``stamp`` marks a request as ours, ``note`` writes to the journal."""

    def __init__(
        self,
        fleet: Fleet,
        speeds: Speeds,
        http: Http,
        now: Callable[[], float],
        stamp: Callable[[MutableMapping[str, str]], None],
        note: Callable[[str, dict[str, Any]], object],
    ) -> None:
        self.fleet, self.speeds = fleet, speeds
        self.schedule = Schedule()
        self.outcomes: Counter[str] = Counter()  #: how tries ended: better, unchanged, failed
        self._http, self._now, self._stamp, self._note = http, now, stamp, note
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for nodes in doubt."""
        self._task = defects.keep_running("probes", self._look_always)

    async def stop(self) -> None:
        """End; a try under way is given up. Safe to call twice."""
        if self._task is not None:
            await cancelled([self._task])

    async def look(self) -> None:
        """Try every node that is due."""
        due = self.schedule.due(self.fleet, self.speeds, self._now())
        await asyncio.gather(*(self._try(*probe) for probe in due))

    async def _look_always(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def _try(self, node: Node, key: str, doubt: Doubt) -> None:
        ask, begun_s = _ask(node, key), self._now()
        flight = node.take(ask, begun_s, self._expected_s(node, key))
        try:
            outcome = await self._send(node, ask, begun_s)
        finally:
            flight.drop(TOKENS, self._now())
        now_s = self._now()
        self.schedule.tried(node.name, now_s, hopeful=outcome == "better")
        self.outcomes[outcome] += 1
        self._note(
            KIND,
            {"node": node.name, "model": key, "doubt": doubt, "outcome": outcome, "took_s": now_s - begun_s},
        )
        if self.speeds.doubt(node.name, now_s) is None:
            log.info(
                "%s was believed %s and has recovered, as a try of %d tokens shows.", node.name, doubt, TOKENS
            )

    async def _send(self, node: Node, ask: Ask, begun_s: float) -> str:
        headers: dict[str, str] = {}
        self._stamp(headers)
        options = {**dict(ask.reload_key), "num_predict": TOKENS, "temperature": 0}
        body = {"model": ask.model, "prompt": PROMPT, "raw": True, "stream": False, "options": options}
        try:
            answer = await fetch(self._http, URL(node.url + PATH), TIMEOUT_S, headers=headers, json=body)
        except PollFailed as failure:
            now_s = self._now()
            node.health.failed(now_s, failure.reason, fatal=failure.at_once)
            self.speeds.observe_failure(node.name, now_s - begun_s, now_s)
            return "failed"
        now_s = self._now()
        node.health.succeeded()
        took_s = now_s - begun_s
        failing = self.speeds.doubt(node.name, now_s) == "failing"
        self.speeds.observe(node, ask, read_stats(answer), took_s, took_s, 1, now_s, probe=True)
        return "better" if failing or self.speeds.surprised(node.name, ask.key) else "unchanged"

    def _expected_s(self, node: Node, key: str) -> float:
        machine = self.speeds.machine(node.name, node.report)
        estimate = self.speeds.estimate(node.name, machine, key, node.models[key].size)
        return TOKENS / estimate.decode_tok_s


def _idle(node: Node) -> bool:
    """Whether neither this proxy nor, as far as its agent tells, another one has work there."""
    # Who may not share with others (no token) is still told how much there is.
    elsewhere = node.report.ollama.requests_in_flight if node.report is not None else None
    return not node.flights and not elsewhere


def _model(node: Node, speeds: Speeds, now_s: float) -> str | None:
    """The model to ask ``node`` for: in memory there, under options that are known, and wanted most."""
    wanted = {
        key: speeds.demand.rate_per_s(key, None, now_s)
        for key in node.resident
        if key in node.loaded_with and key in node.models and speeds.has_decoded(node.name, key)
    }
    key = max(wanted, key=lambda key: wanted[key], default=None)
    return key if key is not None and wanted[key] >= WANTED_PER_S else None


def _ask(node: Node, key: str) -> Ask:
    endpoint = match(PATH)
    assert endpoint is not None
    return Ask(
        endpoint,
        node.models[key].name,
        key,
        reload_key=node.loaded_with[key],
        prompt_tokens=len(PROMPT.split()),
        max_tokens=TOKENS,
        # The runner keeps this prompt in the place of another one.
        prefix=((PROMPT.encode(), len(PROMPT.split())),),
    )
