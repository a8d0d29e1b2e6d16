"""What the fleet says of itself as one Ollama server: models, resident models, version. Pure functions.

Rows are those of the nodes, unchanged but for the form of their times. Field names, orders and shapes:
Ollama v0.33 ``server/routes.go`` and ``openai/openai.go``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from agent.ollama import names
from agent.report import Model, Resident
from proxy_addon.fleet.node import Node

RUNNING = "Ollama is running"

_NEVER = datetime.min.replace(tzinfo=UTC)


def merged(nodes: Iterable[Node]) -> dict[str, Model]:
    """The fleet's models by canonical name, newest first.

    Where nodes hold different digests under one name, the newest ``modified_at`` is the fleet's, as in
    :meth:`proxy_addon.fleet.node.Fleet.digest`; nodes that do not answer their polls are not heard.
    """
    found: dict[str, Model] = {}
    for node in nodes:
        if node.poll_error is None:
            for key, row in node.models.items():
                if key not in found or row.modified_at > found[key].modified_at:
                    found[key] = row
    return dict(sorted(found.items(), key=lambda item: item[1].modified_at, reverse=True))


def tags(nodes: Iterable[Node]) -> dict[str, Any]:
    """The body of ``/api/tags``."""
    return {"models": [_model_row(row) for row in merged(nodes).values()]}


def ps(nodes: Iterable[Node]) -> dict[str, Any]:
    """The body of ``/api/ps``: one row a name, that of the replica that stays longest.

    ``size`` and ``size_vram`` are those of the one replica: clients show their ratio as GPU percentage.
    """
    found: dict[str, Resident] = {}
    for node in nodes:
        for key, row in node.resident.items():
            if key not in found or _expiry(row) > _expiry(found[key]):
                found[key] = row
    rows = sorted(found.values(), key=_expiry, reverse=True)
    return {"models": [_resident_row(row) for row in rows]}


def version(versions: Iterable[str | None]) -> str | None:
    """The lowest of ``versions``: what every node of the fleet can do; None if none is known."""
    return min((text for text in versions if text), key=version_key, default=None)


def version_key(text: str) -> tuple[tuple[int, ...], bool, tuple[tuple[bool, int, str], ...]]:
    """A sort key in the order of semantic versions, except that numbers within a word count as numbers.

    ``0.33.0-rc2`` < ``0.33.0-rc10`` < ``0.33.0``. What follows a ``+`` does not count.
    """
    release, _, pre = text.strip().removeprefix("v").partition("+")[0].partition("-")
    numbers = [int(part) for part in re.findall(r"\d+", release)]
    while numbers and numbers[-1] == 0:
        numbers.pop()  # 0.33 is 0.33.0
    words = (
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.findall(r"\d+|[a-z]+", pre)
    )
    return tuple(numbers), not pre, tuple(words)


def status() -> dict[str, Any]:
    """The body of ``/api/status``: the fleet switches no cloud off; a node that does says so itself."""
    return {"cloud": {"disabled": False, "source": "none"}}


def openai_models(nodes: Iterable[Node]) -> dict[str, Any]:
    """The body of ``/v1/models``; ``data`` is null where there are none, as Go writes an empty slice."""
    rows = [openai_model(row.name, row) for row in merged(nodes).values()]
    return {"object": "list", "data": rows or None}


def openai_model(name: str, row: Model) -> dict[str, Any]:
    """The body of ``/v1/models/{name}``; ``name`` is echoed as the client wrote it."""
    return {
        "id": name,
        "object": "model",
        "created": int(row.modified_at.timestamp()),
        "owned_by": names.parse(row.name).namespace,
    }


def go_time(when: datetime) -> str:
    """``when`` as Go marshals a time: RFC 3339, no trailing zeros in the fraction, ``Z`` for UTC."""
    text = when.isoformat()
    clock, offset = (text[:-6], text[-6:]) if when.tzinfo else (text, "+00:00")
    if "." in clock:
        clock = clock.rstrip("0").rstrip(".")
    return clock + ("Z" if offset == "+00:00" else offset)


def _expiry(row: Resident) -> datetime:
    return row.expires_at or _NEVER


def _model_row(row: Model) -> dict[str, Any]:
    return row.model_dump(exclude_unset=True) | {"modified_at": go_time(row.modified_at)}


def _resident_row(row: Resident) -> dict[str, Any]:
    shown = row.model_dump(exclude_unset=True)
    return shown | {"expires_at": go_time(row.expires_at)} if row.expires_at else shown
