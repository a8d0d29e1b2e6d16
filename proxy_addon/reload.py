"""Settings read anew while the proxy runs: all of them or none, and what cannot change while it runs stays.

A request is served under the settings in force when it came in (``Record.settings``); what works by itself
(polls, discovery, pins, the line) is told of new ones by ``reconfigure``. Both change at one moment of the
event loop, between two of its callbacks.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel

from proxy_addon.settings import Settings, SettingsError

log = logging.getLogger("sollol")

#: What is fixed for as long as the process runs: where it listens, where it remembers, how it is built.
FIXED = ("listen", "modes", "state_dir", "workers", "splice")
SETTLE_S = 0.1  #: an editor may write a file in several steps; it is read once nothing has come for so long

Result = Literal["applied", "unchanged", "refused"]


@runtime_checkable
class Live(Protocol):
    """A part that can go on under other settings. It must not fail: they have been validated."""

    def reconfigure(self, settings: Settings) -> None:
        """Go by ``settings`` from now on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a reload, as ``sollol status`` shows it."""

    at: str
    result: Result
    said: str

    def as_json(self) -> dict[str, str]:
        """For the status."""
        return {"at": self.at, "result": self.result, "said": self.said}


def changed(old: BaseModel, new: BaseModel, above: str = "") -> Iterator[str]:
    """The dotted names of the settings in which two trees differ; a list is one setting."""
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from changed(before, after, f"{above}{name}.")
        elif before != after:
            yield above + name


def with_fixed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """``new`` with the values of ``old`` where they are :data:`FIXED`, and the names of those that differ."""
    kept = [name for name in FIXED if getattr(old, name) != getattr(new, name)]
    return new.model_copy(update={name: getattr(old, name) for name in kept}), kept


def told(names: Iterable[str], kept: Iterable[str]) -> tuple[Result, str]:
    """What is said of a reload that changed ``names`` and could not change ``kept``."""
    names, kept = list(names), list(kept)
    held = f"; {', '.join(kept)} cannot change before a restart" if kept else ""
    if not names:
        return "unchanged", f"settings read, nothing has changed{held}"
    return "applied", f"settings read, changed: {', '.join(names)}{held}"


class Reloader:
    """Reads the settings with ``source`` and has them applied with ``apply``; one reload at a time."""

    def __init__(
        self,
        settings: Settings,
        apply: Callable[[Settings], None],
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self.settings = settings
        self.last: Outcome | None = None  #: of those that were to change something
        self._apply, self._on_outcome = apply, on_outcome
        self._one = asyncio.Lock()

    async def follow(self, source: Callable[[], Settings], asked: asyncio.Event) -> None:
        """Reload whenever ``asked`` is set."""
        while True:
            await asked.wait()
            asked.clear()
            await self.reload(source)

    async def reload(self, source: Callable[[], Settings]) -> None:
        """Go by what ``source`` reads; whatever is wrong there leaves all as it is, and is said once."""
        async with self._one:
            try:
                read = await asyncio.to_thread(source)
            except SettingsError as mistake:
                self._told("refused", f"settings not taken over: {mistake}")
                return
            settings, kept = with_fixed(self.settings, read)
            names = list(changed(self.settings, settings))
            if names:
                self._take_over(settings)
            self._told(*told(names, kept))

    def _take_over(self, settings: Settings) -> None:
        try:
            self._apply(settings)
        except Exception:
            self._apply(self.settings)  # a defect of ours: none of the parts may stay with the new ones
            self._told("refused", "settings not taken over: SOLLOL has failed to apply them")
            raise
        self.settings = settings

    def tell(self, outcome: Outcome) -> None:
        """Remember ``outcome``, and pass it on."""
        if outcome.result != "unchanged" or self.last is None or self.last.result == "refused":
            self.last = outcome
        self._on_outcome(outcome)

    def _told(self, result: Result, said: str) -> None:
        self.tell(Outcome(datetime.now(UTC).isoformat(timespec="seconds"), result, said))
        log.log(logging.WARNING if result == "refused" else logging.INFO, "%s.", said[0].upper() + said[1:])


async def follow(path: Path, on_change: Callable[[], None]) -> None:
    """Call ``on_change`` whenever the file at ``path`` has another content than before.

    Its folder is watched, for editors put a new file in the place of the old one, and Kubernetes a new folder
    in that of a link; what happens to other files there costs a look at this one.
    """
    from asyncinotify import Inotify, Mask

    before = await asyncio.to_thread(_fingerprint, path)
    with Inotify() as inotify:
        inotify.add_watch(path.parent, Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.CREATE | Mask.ONLYDIR)
        while True:
            await inotify.get()
            await _quiet(inotify)
            now = await asyncio.to_thread(_fingerprint, path)
            if now not in (before, None):  # while it is gone there is nothing to read
                before = now
                on_change()


async def _quiet(inotify: Any) -> None:
    """Return once nothing has come for a moment."""
    while True:
        try:
            async with asyncio.timeout(SETTLE_S):
                await inotify.get()
        except TimeoutError:
            return


def _fingerprint(path: Path) -> bytes | None:
    """Tells contents apart; None where there is no file."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
