"""Corrects the estimates of memory by what nodes say their resident models really take."""

from __future__ import annotations

from proxy_addon.fleet.learning import Speeds
from proxy_addon.fleet.node import Fleet
from proxy_addon.placement.memory import need_bytes, shape_of


def observe_sizes(fleet: Fleet, speeds: Speeds) -> None:
    """Teach ``speeds`` the size of every resident model whose context is known. For now and then."""
    for node in fleet:
        for key, resident in node.resident.items():
            row = node.models.get(key)
            if row is None or not resident.context_length or node.kind == "shard":
                continue
            info = fleet.shapes.get(row.digest)
            shape = shape_of(info, row.size) if info else None
            estimate = need_bytes(shape, row.size, resident.context_length, node.parallel)
            speeds.observe_size(key, resident.size, estimate)
