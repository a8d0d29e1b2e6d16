"""Every finished request with its decisions, attempts and terms: the last ones in memory, more on disk.

Between them stand the plans of sharded models, once each, and notes of what the proxy did by itself.

No text of a prompt or an answer is ever in it: an entry is made of lengths, names and times.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from agent.report import ShardPlan
from proxy_addon.entry import CURRENT, HEADER, NONE, Columns, Entry, pack, unpack
from proxy_addon.record import Record
from proxy_addon.ring_file import RingFile, read_lines

log = logging.getLogger(__name__)

IN_MEMORY = 1000  #: requests
FILE_BYTES = 32 << 20  #: two files of this size: the current one and the one before; see placement.md
PLANS = 200  #: of sharded models, in memory; one is made for each load and each loss of a node
NOTES = 1000  #: in memory
FILE, PREVIOUS_FILE = "requests.jsonl", "requests.1.jsonl"
REQUEST, HEAD = b'{"id":', b'{"columns":'  #: how these lines begin, of whichever version


class Journal:
    """The last requests, as their lines on disk, each with the columns that it was written under."""

    def __init__(
        self,
        directory: Path,
        in_memory: int = IN_MEMORY,
        file_bytes: int = FILE_BYTES,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.file = RingFile(directory / FILE, directory / PREVIOUS_FILE, orjson.dumps(HEADER), file_bytes)
        self.plans: OrderedDict[str, Entry] = OrderedDict()  #: of sharded models, by id, the newest last
        self.notes: deque[Entry] = deque(maxlen=NOTES)  #: the newest last
        self._clock = clock
        self._in_memory = in_memory
        self._requests: OrderedDict[str, tuple[Columns, bytes, bool]] = OrderedDict()
        #: id → columns, line, whether it was placed or should have been
        self._read_back(directory)

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return self.file.lost

    def add(self, record: Record) -> None:
        """Keep a finished request that was for Ollama; requests about the proxy itself are not journalled."""
        if record.endpoint is not None:
            line = _line(pack(record, self._clock()))
            self._keep(record.id, CURRENT, line, bool(record.decisions))
            self.file.append(line)

    def planned(self, coordinator: str, plan: ShardPlan) -> None:
        """Keep a plan that ``coordinator`` has told of."""
        self._add({"coordinator": coordinator, "plan": plan.model_dump(mode="json")})

    def note(self, kind: str, data: dict[str, Any]) -> str:
        """Keep what the proxy did by itself, JSON-ready ``data`` of some ``kind``; returns the note's id."""
        note_id = secrets.token_hex(8)
        at = self._clock().isoformat(timespec="milliseconds")
        self._add({"note": kind, "id": note_id, "at": at, "data": data})
        return note_id

    def get(self, entry_id: str) -> Entry | None:
        """The request or note with this id, if it is among those in memory."""
        if (found := self._requests.get(entry_id)) is not None:
            return self._unpacked(*found[:2])
        return next((note for note in self.notes if note["id"] == entry_id), None)

    def recent(self, limit: int) -> list[Entry]:
        """Up to ``limit`` requests that were placed or should have been, the newest first."""
        placed = ((columns, line) for columns, line, placed in reversed(self._requests.values()) if placed)
        return [self._unpacked(*found) for found, _ in zip(placed, range(limit), strict=False)]

    def noted(self, kind: str, limit: int) -> list[Entry]:
        """Up to ``limit`` notes of ``kind``, the newest first."""
        found = (note for note in reversed(self.notes) if note["note"] == kind)
        return [note for note, _ in zip(found, range(limit), strict=False)]

    async def keep(self) -> None:
        """Write what is unwritten, and go on."""
        await self.file.keep()

    async def close(self) -> None:
        """Write what is unwritten."""
        await self.file.close()

    def _read_back(self, directory: Path) -> None:
        """Take what earlier runs have written; of its many requests only those are read that are kept."""
        last: deque[tuple[Columns, bytes]] = deque(maxlen=self._in_memory)
        try:
            for columns, line in read(directory):
                if line.startswith(REQUEST):
                    last.append((columns, line))
                elif (made := parse(line)) is not None:
                    self._take(columns, line, made)
        except OSError as exc:
            log.warning("the journal cannot be read: %s", exc)
        for columns, line in last:
            if (made := parse(line)) is not None:
                self._take(columns, line, made)

    def _add(self, made: Entry) -> None:
        line = _line(made)
        self._take(CURRENT, line, made)
        self.file.append(line)

    def _take(self, columns: Columns, line: bytes, made: Entry) -> None:
        """Keep in memory what ``line`` says."""
        match made:
            case {"id": str(entry_id), "decisions": [*decisions]}:
                self._keep(entry_id, columns, line, bool(decisions))
            case {"note": str(), "id": str(), "at": str(), "data": dict()}:
                self.notes.append(made)
            case {"plan": {"id": str(plan_id)}}:
                self.plans[plan_id] = made
                if len(self.plans) > PLANS:
                    self.plans.popitem(last=False)

    def _keep(self, entry_id: str, columns: Columns, line: bytes, placed: bool) -> None:
        self._requests[entry_id] = columns, line, placed
        if len(self._requests) > self._in_memory:
            self._requests.popitem(last=False)

    def _unpacked(self, columns: Columns, line: bytes) -> Entry:
        """What ``line`` says, with the plan by which it was served, where that is known.

        What cannot be unpacked (a line of a version to come, or a damaged one) is as it was written.
        """
        made: Entry = orjson.loads(line)
        try:
            made = unpack(made, columns)
        except ValueError as exc:
            log.debug("%s: %s", made["id"], exc)
        plan = self.plans.get(str(made.get("shard_plan")))
        return made | {"plan": plan["plan"]} if plan is not None else made


def _line(made: Entry) -> bytes:
    """As it is written and kept: a copy, for what orjson returns holds 8 KB and more of memory."""
    return orjson.dumps(made) + b"\n"


def read(directory: Path) -> Iterator[tuple[Columns, bytes]]:
    """The lines that were written, the oldest first, each with the columns that it was written under.

    Raises OSError where a file is there but cannot be read.
    """
    columns = NONE
    for line in read_lines(directory / FILE, directory / PREVIOUS_FILE):
        header = parse(line) if line.startswith(HEAD) else None
        found = Columns.of_header(header) if header is not None else None
        if found is not None:
            columns = found
        else:
            yield columns, line.rstrip()


def parse(line: bytes) -> Entry | None:
    """What ``line`` says, still packed; None if it was cut by a crash, or is none of ours."""
    try:
        made = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return made if isinstance(made, dict) else None
