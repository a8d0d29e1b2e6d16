"""Plans of sharded models, as coordinators report them: noted once each, in journal and metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from agent.report import ShardPlan
from proxy_addon.fleet import coordinators
from proxy_addon.fleet.node import Node

HEADER = "x-sollol-shard-plan"  #: in a coordinator's answers: the id of the plan that served
KEPT = 1000  #: ids that are remembered; a report has far fewer


class Plans:
    """Tells ``observers`` of every plan that was not ``known`` before, with its coordinator's name."""

    def __init__(self, known: Iterable[str], observers: Iterable[Callable[[str, ShardPlan], None]]) -> None:
        self._known = OrderedDict.fromkeys(known)
        self._observers = tuple(observers)

    def look(self, node: Node) -> None:
        """Go through the newest report of ``node``."""
        for plan in coordinators.plans(node.report):
            if plan.id in self._known:
                continue
            self._known[plan.id] = None
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
            for observer in self._observers:
                observer(node.name, plan)


def of_answer(headers: Mapping[str, str], node: Node | None, key: str) -> str | None:
    """The id of the plan by which an answer of ``node`` for the model ``key`` was made."""
    if node is None or not node.coordinator:
        return None
    return headers.get(HEADER) or coordinators.plan_in_use(node.report, key)
