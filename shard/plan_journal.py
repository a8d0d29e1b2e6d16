"""The coordinator's journal: every plan and replan with its reason, on disk in a bounded file."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from pydantic import ValidationError

from agent.report import ShardPlan

log = logging.getLogger(__name__)

IN_REPORT = 16
#: A plan over 15 devices is about 3 KB; the file is cut to its newer half when it has grown to this.
FILE_BYTES = 1 << 20


class PlanJournal:
    """Plans, newest last. What a disk refuses is said once and kept in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.latest: deque[ShardPlan] = deque(self._read(), maxlen=IN_REPORT)
        self._refused = False

    def add(self, plan: ShardPlan) -> None:
        """Keep ``plan``, in place of what was known of it before; blocks for one short write."""
        known = [one.id for one in self.latest]
        if plan.id in known:
            self.latest[known.index(plan.id)] = plan
        else:
            self.latest.append(plan)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and self._path.stat().st_size > FILE_BYTES:
                lines = self._path.read_bytes().splitlines(keepends=True)
                shorter = self._path.with_suffix(".shorter")
                shorter.write_bytes(b"".join(lines[len(lines) // 2 :]))
                shorter.replace(self._path)
            with self._path.open("a") as file:
                file.write(plan.model_dump_json() + "\n")
        except OSError as error:
            if not self._refused:
                log.warning("plans cannot be kept in %s: %s", self._path, error.strerror or error)
            self._refused = True

    def _read(self) -> list[ShardPlan]:
        try:
            lines = self._path.read_text().splitlines()[-2 * IN_REPORT :]
        except OSError:
            return []
        found: dict[str, ShardPlan] = {}
        for line in lines:
            try:
                plan = ShardPlan.model_validate_json(line)
            except ValidationError:
                log.warning("%s has a line that is no plan; it is passed over", self._path)
            else:
                found[plan.id] = plan
        return list(found.values())
