"""Fleets of plain data for the tests of this folder."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from agent.ollama import names
from agent.report import Model, Resident
from proxy_addon.fleet.node import Fleet, Node

DAY = "2026-08-{:02}T10:00:00Z"


def model(name: str, digest: str = "a" * 64, day: int = 1, **more: Any) -> Model:
    """A row of /api/tags; the higher ``day``, the newer."""
    row = {"name": name, "model": name, "modified_at": DAY.format(day), "size": 1000, "digest": digest}
    return Model.model_validate(row | more)


def resident(name: str, day: int = 1, **more: Any) -> Resident:
    """A row of /api/ps; the higher ``day``, the longer it stays."""
    row = {"name": name, "model": name, "size": 10, "size_vram": 10, "expires_at": DAY.format(day)}
    return Resident.model_validate(row | more)


def node(
    host: str, *models: Model, port: int = 11434, loaded: tuple[Resident, ...] = (), **more: Any
) -> Node:
    """A node that answered its last poll."""
    made = Node(host, port, polled_s=0.0, version="0.33.0")
    made.models = {names.canonical(row.name): row for row in models}
    made.resident = {names.canonical(row.name): row for row in loaded}
    for name, value in more.items():
        setattr(made, name, value)
    return made


def fleet(*nodes: Node) -> Fleet:
    """A fleet of ``nodes``."""
    made = Fleet()
    for each in nodes:
        made.add(each)
    return made


def utc(*parts: int) -> datetime:
    """A time in UTC."""
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type, misc]
