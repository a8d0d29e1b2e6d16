"""One pass through the line: who can be started now, and where. No loop and no clock in it.

All are looked at in the line's order. Whoever has been looked at holds a place on a node for the rest of the
pass, whether it is started there or had better wait for it, so that nobody behind counts on the same slot.
Nothing is left of these places afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from proxy_addon.admission.waiter import NOTHING, Kind, Waiter
from proxy_addon.ask import Ask
from proxy_addon.endpoints import Task
from proxy_addon.fleet.node import Fleet, Flight, Node
from proxy_addon.fleet.slots import to_offer
from proxy_addon.placement.decision import Decision
from proxy_addon.placement.runner import slots_for, slots_of

LOOKS = 64  #: decisions in one pass: at about 50 µs each it stays near 3 ms
LOOKS_IN_VAIN = 32  #: of them for those alike who had better wait: others behind them may not need to
FULL = "has no slot free"
KEPT_FREE = "is kept free for a request before this one, which must load its model there"

Decide = Callable[[Waiter, Mapping[str, str]], Decision]


def where(
    waiter: Waiter, fleet: Fleet, decide: Decide, ahead_s: float, closed: Mapping[str, str] = NOTHING
) -> tuple[Decision, bool]:
    """Where ``waiter`` should go, and whether it can now: a slot is free, or will be within ``ahead_s``.

    A policy that does not count seconds would choose a full node while others are idle: it is asked again
    among those that are not.
    """
    first = decision = decide(waiter, closed)
    while decision.node is not None:
        if _ready(waiter.ask, fleet.nodes[decision.node], decision.wait_s, ahead_s):
            return decision, True
        if decision.chosen is None or "wait_s" in decision.chosen.terms:
            break
        full = [
            row.node
            for row in decision.rows
            if not _ready(waiter.ask, fleet.nodes[row.node], row.wait_s, ahead_s)
        ]
        closed = {**closed, **dict.fromkeys((*full, decision.node), FULL)}
        decision = decide(waiter, closed)
    return first, False


class Pass:
    """Sorts those that wait into ``chosen`` (with their nodes), ``nobody`` (may serve them), and the rest."""

    def __init__(self, fleet: Fleet, decide: Decide, ahead_s: float, now_s: float) -> None:
        self.chosen: list[tuple[Waiter, Decision]] = []
        self.nobody: list[tuple[Waiter, Decision]] = []
        self.failed: list[tuple[Waiter, Exception]] = []  #: deciding raised: told to whoever asked, alone
        self.due_s = float("inf")  #: when the first of the places that are waited for should be free
        self._fleet = fleet
        self._decide = decide
        self._ahead_s = ahead_s
        self._now_s = now_s
        self._held: list[Flight] = []
        self._closed: dict[str, str] = {}  # nodes that nobody behind may be given

    def go_through(self, line: Iterable[Waiter], kinds: Collection[Kind]) -> None:
        """Look at everyone in ``line``, whose kinds are ``kinds``, until nobody behind could be started."""
        aside: list[Waiter] = []
        shut: set[Kind] = set()
        looks, in_vain = 0, Counter[Kind]()
        try:
            for waiter in line:
                if looks == LOOKS or len(shut) == len(kinds):
                    break
                if waiter.kind in shut:
                    continue
                if not self._may_be_free(waiter.ask):
                    shut.add(waiter.kind)
                    continue
                looks += 1
                before = len(self.chosen)
                self._look_at(waiter, kinds, aside)
                in_vain[waiter.kind] += len(self.chosen) == before
                if in_vain[waiter.kind] == LOOKS_IN_VAIN:
                    shut.add(waiter.kind)
            for waiter in aside:
                self._look_at(waiter, (), aside)
        finally:
            for flight in self._held:
                flight.cancel()

    def _look_at(self, waiter: Waiter, kinds: Collection[Kind], aside: list[Waiter]) -> None:
        try:
            decision, ready = where(waiter, self._fleet, self._decide, self._ahead_s, self._closed)
            if decision.node is None and self._closed:
                decision, ready = self._decide(waiter, NOTHING), False
                if decision.node is not None:
                    return  # it waits for one that is kept free
        except Exception as error:  # noqa: BLE001 - it must not keep all others waiting
            self.failed.append((waiter, error))
            return
        if decision.node is None:
            self.nobody.append((waiter, decision))
            return
        node = self._fleet.nodes[decision.node]
        if ready and self._steps_aside(waiter, decision, node, kinds):
            aside.append(waiter)
            return
        if ready or self._is_trial(waiter.ask, decision, node):
            self.chosen.append((waiter, decision))
        else:
            if not self._is_patient(waiter, decision) and not _is_loading(node, waiter.ask):
                self._closed[node.name] = KEPT_FREE
            self.due_s = min(self.due_s, self._now_s + decision.wait_s - self._ahead_s)
        loads = _term(decision, "load_s") > 0
        self._held.append(
            node.reserve(
                waiter.ask,
                self._now_s,
                decision.expected_s,
                loads,
                decision.service_s,
                decision.evicts,
                decision.need_bytes,
                decision.wait_s,
            )
        )

    def _is_patient(self, waiter: Waiter, decision: Decision) -> bool:
        """Whether ``waiter`` lets others use the models in memory rather than have its own loaded.

        For as long as it has waited less than that load costs. Without this, models take turns needlessly;
        without an end to it, those in memory are never idle, and another one never comes. Nobody waits much
        longer than twice what it would have had to (this is the ski rental problem).
        """
        load_s = _term(decision, "load_s")
        return load_s == 0 or waiter.so_far_s(self._now_s) < load_s + _term(decision, "evict_s")

    def _steps_aside(self, waiter: Waiter, decision: Decision, node: Node, kinds: Collection[Kind]) -> bool:
        """Whether others, no less urgent, are looked at first: the model they wait for would have to go."""
        if _term(decision, "evict_s") <= 0 or not self._is_patient(waiter, decision):
            return False
        return any(
            key in node.resident and key != waiter.ask.key and priority >= waiter.priority
            for key, _, priority in kinds
        )

    def _is_trial(self, ask: Ask, decision: Decision, node: Node) -> bool:
        """Whether ``ask`` is sent to show how many ``node`` serves at a time: one more than is known of."""
        in_use = node.in_use.get(ask.key, 0)
        return not _term(decision, "load_s") and node.parallel <= in_use < _offered(node, ask, self._now_s)

    def _may_be_free(self, ask: Ask) -> bool:
        """Whether a decision for ``ask`` could start it now. Quick; wrong only to the side of yes."""
        able, soon_s = False, self._now_s + self._ahead_s
        for node in self._fleet:
            if ask.key not in node.models or not node.up(self._now_s):
                continue
            able = True
            if node.in_use.get(ask.key, 0) < _offered(node, ask, self._now_s) or any(
                self._now_s <= flight.started_s + flight.expected_s <= soon_s
                for flight in node.flights
                if flight.ask.key == ask.key
            ):
                return True
        return not able  # nobody may serve it: it must be told so


def _ready(ask: Ask, node: Node, wait_s: float, ahead_s: float) -> bool:
    if wait_s > ahead_s or ask.key not in node.models:
        return False
    # Flights of which nothing is expected, as a policy without seconds has them, end at no known time.
    return wait_s > 0 or node.in_use.get(ask.key, 0) < slots_of(node, ask, node.models[ask.key])


def _offered(node: Node, ask: Ask, now_s: float) -> int:
    """How many requests like ``ask`` may be on ``node``: its runner's slots, and one more on trial."""
    if ask.task is Task.EMBED or slots_for(2, node.models[ask.key]) == 1:
        return 1
    return to_offer(node, now_s)


def _term(decision: Decision, name: str) -> float:
    """What is expected on the chosen node, whatever the policy makes of it."""
    row = decision.row
    return float(getattr(row, name)) if row is not None else 0.0


def _is_loading(node: Node, ask: Ask) -> bool:
    return any(f.load and f.first_byte_s is None and f.ask.key == ask.key for f in node.flights)
