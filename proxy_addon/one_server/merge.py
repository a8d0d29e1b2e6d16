"""One pull's progress out of several nodes': a pure state machine, rows in, rows out.

What a client sees must read as the pull of one server:

- a status is passed on once every node that still works has said it;
- a bar (rows with a ``digest``) has that layer's own size as ``total`` and the slowest node's bytes as
  ``completed``, and never runs backwards, though a node does when it fetches a broken part again;
- a node that fails is named in a status of its own, and the others go on;
- the last row is ``success`` if any node has the model now; it lists who has not under ``failed``. Only if
  all have failed is it an ``error``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node's pull ended. ``unreachable``: it gave no answer or broke off, so another may replace it."""

    status: int
    message: str
    unreachable: bool = False


@dataclass(slots=True)
class _Bar:
    row: Row
    completed: dict[str, int] = field(default_factory=dict)  #: by node
    shown: int = -1


class Merge:
    """The pull of one model on ``nodes`` (names)."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self.running = list(nodes)
        self.finished: list[str] = []
        self.failed: dict[str, Failure] = {}
        self._said: dict[str, set[str]] = {}  # status → who has said it, while somebody has not
        self._passed_on: set[str] = set()
        self._bars: dict[str, _Bar] = {}

    def feed(self, node: str, row: Row) -> list[Row]:
        """Take in a row of ``node``; the rows that the client gets for it."""
        if "error" in row:
            return self.fail(node, Failure(500, str(row["error"])))
        status = str(row.get("status", ""))
        if status == "success":
            self.running.remove(node)
            self.finished.append(node)
        elif digest := row.get("digest"):
            bar = self._bars.setdefault(digest, _Bar(row))
            bar.completed[node] = _bytes(row, "completed")
        elif status not in self._passed_on:
            self._said.setdefault(status, set()).add(node)
        return self._settle()

    def fail(self, node: str, failure: Failure, replaced_by: str | None = None) -> list[Row]:
        """``node`` has failed; ``replaced_by`` pulls in its place. The rows that the client gets for it."""
        self.running.remove(node)
        self.failed[node] = failure
        if replaced_by:
            self.running.append(replaced_by)
        going_on = ", ".join([*self.finished, *self.running])
        if not going_on:
            return []
        return [{"status": f"{node} failed: {failure.message}; going on with {going_on}"}, *self._settle()]

    def result(self) -> tuple[int, Row]:
        """HTTP status and last row, once nobody is running any more."""
        if self.finished:
            failed = [{"node": node, "error": failure.message} for node, failure in self.failed.items()]
            return 200, {"status": "success"} | ({"failed": failed} if failed else {})
        failures = list(self.failed.values())
        if len({failure.message for failure in failures}) == 1 and not failures[0].unreachable:
            return failures[0].status, {"error": failures[0].message}  # in the nodes' own words
        text = "; ".join(f"{node} failed: {failure.message}" for node, failure in self.failed.items())
        return failures[0].status, {"error": text}

    def _settle(self) -> list[Row]:
        rows = []
        for status, sayers in list(self._said.items()):
            if sayers.issuperset(self.running):
                del self._said[status]
                self._passed_on.add(status)
                rows.append({"status": status})
        return rows + [row for bar in self._bars.values() if (row := self._advance(bar))]

    def _advance(self, bar: _Bar) -> Row | None:
        if not bar.completed.keys() >= set(self.running):
            return None  # somebody has yet to come to this layer
        completed = min((bar.completed[node] for node in self.running), default=_bytes(bar.row, "total"))
        if completed <= bar.shown:
            return None
        bar.shown = completed
        row = {name: value for name, value in bar.row.items() if name != "completed"}
        return row | ({"completed": completed} if completed else {})


def _bytes(row: Row, name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) else 0  # Ollama leaves zeros out
