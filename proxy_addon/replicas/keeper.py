"""Acts on what ``plan.py`` and ``pins.py`` decide, and says why, in the journal.

It looks at the fleet when there is news, when requests come and go, and when the last look said so; at most
once in :data:`LOOK_EVERY_S`, in large fleets more seldom, and never while nothing can have changed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mitmproxy import http

from agent.ollama import names
from proxy_addon.fleet.node import Node
from proxy_addon.placement.rules import Rules
from proxy_addon.record import Record
from proxy_addon.replicas import snapshot
from proxy_addon.replicas.actions import Action, Keep, Load
from proxy_addon.replicas.hands import Hands
from proxy_addon.replicas.pins import PAUSE_S, Past, Pin, hold
from proxy_addon.replicas.plan import State, due, plan
from proxy_addon.settings import Settings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
LOOK_SHARE = 0.05  #: of the time is spent on looks at most, however large the fleet
SERVICE_GAIN = 0.1  #: of one request in what is expected of the next
KIND = "replica"  #: of the notes in the journal

NO_LINE: tuple[tuple[str, float], ...] = ()


class Keeper:
    """Keeps pinned models in memory and, where ``replicas`` is ``auto``, hot models on several nodes.

    ``note`` writes to the journal, ``count`` counts an action by its name, ``waiting`` tells of
    each request in the proxy's own line its model (canonical name) and how long it has waited. Without
    ``acts`` it only knows what is pinned, so that placement leaves that alone: another worker acts.
    """

    def __init__(
        self,
        hands: Hands,
        rules: Rules,
        now: Callable[[], float],
        note: Callable[[str, dict[str, Any]], object],
        count: Callable[[str], None],
        waiting: Callable[[], Iterable[tuple[str, float]]] = lambda: NO_LINE,
        acts: bool = True,
    ) -> None:
        self.hands, self.rules = hands, rules
        self.fleet, self.speeds, self.settings = hands.fleet, hands.speeds, hands.settings
        self.pins = {pin: Past() for pin in _pins(self.settings)}
        self.state = State()
        self.acts = acts
        self._now, self._note, self._count, self._waiting = now, note, count, waiting
        self._said: dict[Pin, str] = {}  #: what is wrong with a pin, as it was logged
        self._service_s: dict[str, float] = {}  #: by model, of the requests that ended well
        self._acting: dict[tuple[str, str], Action] = {}  #: (model, node) → what is under way
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._cut: dict[tuple[str, str], str] = {}  #: what is to end in the middle, and why
        self._loaded_s: dict[str, float] = {}  #: node → when our last load there ended
        self._timer: asyncio.TimerHandle | None = None
        self._next_look_s = -math.inf  #: the earliest
        self._started = False
        self._running = False  #: started, and there is something to do

    def start(self) -> None:
        """Begin: every node was looked at once."""
        self.fleet.on_news.append(lambda _: self.stir())
        self.fleet.on_lost.append(self._lost)
        self._started = True
        self._resume()

    def reconfigure(self, settings: Settings) -> None:
        """Hold the pins of ``settings`` from now on; what is known of those that stay is kept."""
        self.settings, self.rules = settings, Rules.of(settings)
        self.pins = {pin: self.pins.get(pin, Past()) for pin in _pins(settings)}
        self._said = {pin: said for pin, said in self._said.items() if pin in self.pins}
        if settings.replicas == "off":
            self.state, self.fleet.replicas = State(), []
        if self._running:
            self._look()  # once more, should there be nothing left to do: no node holds pins of ours then
        self._resume()

    def _resume(self) -> None:
        """Look, if there is anything to do at all."""
        self._running = self._started and bool(self.pins or self.settings.replicas == "auto")
        self.stir()

    async def stop(self) -> None:
        """Act no more; a load under way is given up. Safe to call twice."""
        self._started = self._running = False
        if self._timer is not None:
            self._timer.cancel()
        acting = dict(self._tasks)
        for where, task in acting.items():
            self._cut[where] = "SOLLOL ends"
            task.cancel()
        await asyncio.gather(*acting.values(), return_exceptions=True)

    def stir(self) -> None:
        """Something has changed that may matter: look soon. Cheap, may be called for every request."""
        if self._running:
            self._look_at(self._now())

    def request(self, flow: http.HTTPFlow) -> None:
        """Somebody asks for something."""
        self.stir()

    def observe(self, record: Record) -> None:
        """Learn from a request that has ended how long it kept a slot."""
        if not self._running or record.outcome != "ok" or record.ask is None or not record.decisions:
            return
        stats, key = record.stats, record.ask.key
        measured_s = (stats.prefill_s or 0.0) + (stats.decode_s or 0.0) if stats else 0.0
        service_s = measured_s or record.decisions[-1].service_s
        if service_s > 0:
            before_s = self._service_s.get(key, service_s)
            self._service_s[key] = before_s + SERVICE_GAIN * (service_s - before_s)
        self.stir()

    def _lost(self, node: Node, reason: str) -> None:
        """Nothing that was begun on ``node`` will come to its end."""
        for where, task in self._tasks.items():
            if where[1] == node.name:
                self._cut[where] = f"{node.name} is lost: {reason}"
                task.cancel()
        self.stir()

    # when to look

    def _look_at(self, moment_s: float) -> None:
        """Look at ``moment_s`` or, if a look is due before, then."""
        moment_s = max(moment_s, self._next_look_s)
        if self._timer is not None:
            if self._timer.when() <= moment_s:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(moment_s, self._look)

    def _look(self) -> None:
        now_s, self._timer = self._now(), None
        next_s = self._hold_pins(now_s)
        if self.acts and self.settings.replicas == "auto":
            next_s = min(next_s, self._spread(now_s))
        self._next_look_s = now_s + max(LOOK_EVERY_S, (self._now() - now_s) / LOOK_SHARE)
        if next_s < math.inf:
            self._look_at(next_s)

    # what to do

    def _hold_pins(self, now_s: float) -> float:
        """Do what the pins need; when to look again."""
        next_s, pinned, rows = math.inf, {name: set[str]() for name in self.fleet.nodes}, []
        for pin, past in self.pins.items():
            found = snapshot.stand(pin, past, self.fleet, self.speeds, self.rules, self._acting, now_s)
            held = hold(pin, found, past, now_s)
            home = found.node or pin.node
            if home in pinned:
                pinned[home].add(pin.model)
                self.fleet.nodes[home].pinned |= {pin.model}  # for the pins that come after this one
            self._say(pin, held.trouble, home)
            rows.append(_row(pin, home, found.stays_s is not None, found.loading, held.trouble))
            if isinstance(held.action, Load) and self._changing(held.action.node):
                next_s = min(next_s, now_s + PAUSE_S)  # what is free there will be known then
                continue
            self.pins[pin] = held.past
            next_s = min(next_s, held.next_s)
            if held.action is not None:
                self._begin(held.action, pin)
        for name, models in pinned.items():
            self.fleet.nodes[name].pinned = frozenset(models)
        self.fleet.pins = rows
        return next_s

    def _spread(self, now_s: float) -> float:
        """Load and give up replicas; when to look again."""
        limits = self.settings.replication
        followed = {*self.state.met_s, *(key for key, _ in self.state.used_s)}
        models = snapshot.wanted(
            self.fleet, self.speeds, self.rules, self._service_s, self._waiting(), followed, now_s
        )
        busy = {name for name in self.fleet.nodes if self._changing(name)}
        for key in due(models, self.state, limits, now_s):
            found = snapshot.places(key, models[key], self.fleet, self.speeds, self.rules, busy, now_s)
            models[key] = replace(models[key], places=found)
            for name in {name for place in found for name in place.evicts} - models.keys():
                models[name] = snapshot.resting(name, self.fleet, self.speeds, now_s)
        pinned = {node.name: node.pinned for node in self.fleet}
        made = plan(models, pinned, self.state, limits, now_s)
        self.state = made.state
        for action in made.actions:
            self._begin(action)
        self.fleet.replicas = [{"model": names.display(m), "node": n} for m, n in sorted(self.state.used_s)]
        return made.next_s

    def _changing(self, name: str) -> bool:
        """Whether we are loading something on the node ``name``, or its report is of before we had."""
        if any(node == name and not isinstance(act, Keep) for (_, node), act in self._acting.items()):
            return True
        node = self.fleet.nodes[name]
        return node.report is not None and (node.report_s or 0.0) < self._loaded_s.get(name, -math.inf)

    def _say(self, pin: Pin, trouble: str, home: str | None) -> None:
        """Log once what is wrong with a pin, whatever figures change in it, and that it no longer is."""
        said, now = self._said.get(pin, ""), re.sub(r"[\d.]+", "", trouble)
        if now and now != said:
            log.warning("%s.", trouble)
        elif said and not now:
            log.info("%s is kept in the memory of %s now.", names.display(pin.model), home)
        self._said[pin] = now

    # doing it

    def _begin(self, action: Action, pin: Pin | None = None) -> None:
        where = (action.model, action.node)
        if self.acts and where not in self._acting:
            self._acting[where] = action
            task = asyncio.create_task(self._act(action, pin), name=f"{action.name} {action.model}")
            self._tasks[where] = task
            task.add_done_callback(lambda ended: self._ended(where, ended))

    def _ended(self, where: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._acting[where], self._tasks[where]
        self._cut.pop(where, None)
        if not task.cancelled() and (defect := task.exception()) is not None:
            log.error("A defect of SOLLOL's has ended %s.", task.get_name(), exc_info=defect)
        self.stir()

    async def _act(self, action: Action, pin: Pin | None) -> None:
        """Do it, and write down what became of it."""
        begun_s, outcome = self._now(), ""
        try:
            answer = await self.hands.do(action)
            outcome = "ok" if answer.ok else f"failed: {answer.error}"
            if pin is not None:
                self.pins[pin] = replace(self.pins[pin], error="" if answer.ok else answer.error)
        finally:
            model, ended_s = names.display(action.model), self._now()
            if isinstance(action, Load):
                self._loaded_s[action.node] = ended_s
            outcome = outcome or f"cut short: {self._cut.get((action.model, action.node), 'a defect')}"
            self._count(action.name)
            log.info("%s %s on %s: %s; %s.", action.name, model, action.node, action.reason, outcome)
            made = {"action": action.name, "model": model, "node": action.node, "reason": action.reason}
            self._note(KIND, made | {"outcome": outcome, "duration_s": round(ended_s - begun_s, 3)})


def _pins(settings: Settings) -> list[Pin]:
    return [Pin(pin.model, pin.node) for pin in settings.pin]


def _row(pin: Pin, home: str | None, resident: bool, loading: bool, why: str) -> dict[str, Any]:
    """How a pin stands, for the status."""
    state = "kept" if resident else "loading" if loading else "missing"
    return {"model": names.display(pin.model), "node": home, "state": state, "why": why}
