"""Plans of sharded models, as coordinators report them: noted once each, in journal and metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from agent.report import ShardPlan
from proxy_addon.fleet import coordinators
from proxy_addon.fleet.node import Node

HEADER = "x-sollol-shard-plan"  #: in a coordinator's answers: the id of the plan that served
Observer = Callable[[str, ShardPlan], None]
KEPT = 1000  #: ids that are remembered; a report has far fewer


class Plans:
    """Tells of every plan that was not ``known`` before, and again once its memory was measured.

    ``made`` and ``measured`` are called with the coordinator's name and the plan.
    """

    def __init__(self, known: Iterable[str], made: Iterable[Observer], measured: Observer) -> None:
        self._known = OrderedDict.fromkeys(known, False)  # id → whether its memory was measured
        self._made = tuple(made)
        self._measured = measured

    def look(self, node: Node) -> None:
        """Go through the newest report of ``node``."""
        for plan in coordinators.plans(node.report):
            measured = any(share.used_bytes is not None for share in plan.shares)
            if plan.id not in self._known:
                for observer in self._made:
                    observer(node.name, plan)
            elif measured and not self._known[plan.id]:
                self._measured(node.name, plan)
            self._known[plan.id] = measured or self._known.get(plan.id, False)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)


def of_answer(headers: Mapping[str, str], node: Node | None, key: str) -> str | None:
    """The id of the plan by which an answer of ``node`` for the model ``key`` was made."""
    if node is None or not node.coordinator:
        return None
    return headers.get(HEADER) or coordinators.plan_in_use(node.report, key)
