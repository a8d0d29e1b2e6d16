"""Corrects the estimates of memory by what models, where they are loaded, really take."""

from __future__ import annotations

from agent.report import ShardLoad
from proxy_addon.fleet.coordinators import key_of, loads
from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Node


def observe_sizes(node: Node, speeds: Speeds) -> None:
    """Teach ``speeds`` the size of everything that ``node`` has loaded, whenever it says something new."""
    for load in loads(node.report):
        _observe_shares(load, speeds)
    if node.kind == "shard" or (node.report is not None and node.report.kind == "shard"):
        return  # its /api/ps has the size of the file
    for key, resident in node.resident.items():
        if resident.context_length:
            speeds.observe_size(key, resident.context_length * max(node.parallel, 1), resident.size)


def _observe_shares(load: ShardLoad, speeds: Speeds) -> None:
    """A sharded model takes a little more than on one node, for each device has buffers of its own."""
    key, plan = key_of(load.model), load.plan
    if key is None or plan is None or load.phase != "ready":
        return
    used = [share.used_bytes for share in plan.shares if share.used_bytes is not None]
    if len(used) == len(plan.shares):
        speeds.observe_size(key, plan.num_ctx * plan.parallel, sum(used))
