"""Every finished request with its decisions, attempts and terms: the last ones in memory, more on disk.

Between them stand the plans of sharded models, once each.

No text of a prompt or an answer is ever in it: an entry is made of lengths, names and times.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from agent.report import ShardPlan
from proxy_addon.placement.decision import Decision
from proxy_addon.record import Record

log = logging.getLogger(__name__)

Entry = dict[str, Any]

IN_MEMORY = 1000
FILE_BYTES = 8 << 20  #: two files of this size at most: the current one and the one before
FLUSH_AFTER_S = 0.5  #: entries reach the disk in batches, so long after the first of a batch
UNWRITTEN = 10_000  #: a disk that hangs costs the oldest entries, never memory without end
PLANS = 200  #: of sharded models, in memory; one is made for each load and each loss of a node
CANDIDATES = 50  #: in an entry; of a larger fleet the cheapest, with the number left out


def entry(record: Record, ended_at: datetime) -> Entry:
    """``record`` as JSON-ready data; all seconds count from its start."""

    def since_start(moment_s: float | None) -> float | None:
        return None if moment_s is None else round(moment_s - record.started_s, 6)

    duration_s = since_start(record.ended_s) or 0.0
    made: Entry = {
        "id": record.id,
        "at": datetime.fromtimestamp(ended_at.timestamp() - duration_s, UTC).isoformat(
            timespec="milliseconds"
        ),
        "client": record.client,
        "protocol": record.protocol,
        "path": record.endpoint.path if record.endpoint else None,
        "outcome": record.outcome,
        "status": record.status,
        "node": record.attempts[-1].node if record.attempts else None,
        "duration_s": duration_s,
        "first_byte_s": since_start(record.first_byte_s),
    }
    if ask := record.ask:
        names = ("model", "stream", "num_ctx", "prompt_tokens", "max_tokens", "images", "tools", "priority")
        made |= {name: getattr(ask, name) for name in names} | {"task": ask.task.value}
    made["decisions"] = [_bounded(decision) for decision in record.decisions]
    made["attempts"] = [
        asdict(attempt)
        | {"started_s": since_start(attempt.started_s), "ended_s": since_start(attempt.ended_s)}
        for attempt in record.attempts
    ]
    made["stats"] = asdict(record.stats) if record.stats else None
    if record.shard_plan is not None:
        made["shard_plan"] = record.shard_plan
    return made


def _bounded(decision: Decision) -> Entry:
    left_out = len(decision.candidates) - CANDIDATES
    if left_out <= 0:
        return decision.as_dict()
    kept = sorted(decision.candidates, key=lambda c: (c.node != decision.node, c.cost))[:CANDIDATES]
    short = Decision(decision.policy, decision.node, tuple(kept), decision.reason)
    return short.as_dict() | {"candidates_left_out": left_out}


class Journal:
    """A ring of entries, and a file of them that is replaced when it has grown to ``file_bytes``."""

    def __init__(
        self,
        directory: Path,
        in_memory: int = IN_MEMORY,
        file_bytes: int = FILE_BYTES,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = directory / "requests.jsonl"
        self.previous_path = directory / "requests.1.jsonl"
        self.lost = 0  #: entries that could not be written
        self._file_bytes = file_bytes
        self._clock = clock
        self.plans: OrderedDict[str, Entry] = OrderedDict()  #: of sharded models, by id, the newest last
        self._ring: deque[Entry] = deque(self._read_back(), maxlen=in_memory)
        self._unwritten: deque[Entry] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: Future[int] | None = None
        self._writer = ThreadPoolExecutor(1, "journal")

    def add(self, record: Record) -> None:
        """Keep a finished request that was for Ollama; requests about the proxy itself are not journalled."""
        if record.endpoint is None:
            return
        made = entry(record, self._clock())
        self._ring.append(made)
        self._write_soon(made)

    def planned(self, coordinator: str, plan: ShardPlan) -> None:
        """Keep a plan that ``coordinator`` has told of."""
        made = {"coordinator": coordinator, "plan": plan.model_dump(mode="json")}
        self._keep(made)
        self._write_soon(made)

    def _keep(self, made: Entry) -> None:
        self.plans[made["plan"]["id"]] = made
        if len(self.plans) > PLANS:
            self.plans.popitem(last=False)

    def _write_soon(self, made: Entry) -> None:
        self._unwritten.append(made)
        if len(self._unwritten) > UNWRITTEN:
            self._unwritten.popleft()
            self.lost += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._flush)

    def get(self, request_id: str) -> Entry | None:
        """The request with this id, if it is among those in memory."""
        made = next((made for made in reversed(self._ring) if made["id"] == request_id), None)
        return self._with_plan(made) if made is not None else None

    def recent(self, limit: int) -> list[Entry]:
        """Up to ``limit`` requests that were placed or should have been, the newest first."""
        found: list[Entry] = []
        for made in reversed(self._ring):
            if len(found) >= limit:
                break
            if made["decisions"]:
                found.append(self._with_plan(made))
        return found

    def _with_plan(self, made: Entry) -> Entry:
        """``made`` with the plan by which it was served, where that is known."""
        plan = self.plans.get(made.get("shard_plan", ""))
        return made | {"plan": plan["plan"]} if plan is not None else made

    async def close(self) -> None:
        """Write what is unwritten."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writing is not None:
            await asyncio.wrap_future(self._writing)
        self._flush()
        if self._writing is not None:
            await asyncio.wrap_future(self._writing)
        self._writer.shutdown()

    def _flush(self) -> None:
        self._timer = None
        if self._writing is not None and not self._writing.done():  # the disk is slow: let it finish
            self._timer = asyncio.get_running_loop().call_later(FLUSH_AFTER_S, self._flush)
        elif self._unwritten:
            batch, self._unwritten = self._unwritten, deque()
            self._writing = self._writer.submit(self._write, batch)
            self._writing.add_done_callback(self._count_lost)

    def _count_lost(self, written: Future[int]) -> None:
        self.lost += written.result()

    def _write(self, batch: deque[Entry]) -> int:
        """Append ``batch`` (in the writer's thread). Returns how many entries were lost."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.writelines(orjson.dumps(made) + b"\n" for made in batch)
                size_bytes = file.tell()
            if size_bytes >= self._file_bytes:
                self.path.replace(self.previous_path)
        except OSError as exc:
            log.warning("the journal cannot be written: %s", exc)
            return len(batch)
        return 0

    def _read_back(self) -> Iterator[Entry]:
        """What earlier runs have written, the oldest first; a line that was cut by a crash is passed over."""
        for path in (self.previous_path, self.path):
            try:
                lines = path.read_bytes().splitlines()
            except FileNotFoundError:
                continue
            except OSError as exc:
                log.warning("the journal cannot be read: %s", exc)
                continue
            for line in lines:
                try:
                    made = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue
                if not isinstance(made, dict):
                    continue
                if "id" in made and "decisions" in made:
                    yield made
                elif isinstance(made.get("plan"), dict) and "id" in made["plan"]:
                    self._keep(made)
