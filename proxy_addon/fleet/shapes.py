"""What models are made of and what their Modelfiles set: ``/api/show``, asked once per digest."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson
from yarl import URL

from proxy_addon import defects
from proxy_addon.ask import RELOAD_OPTIONS, ReloadKey, normal
from proxy_addon.fleet.node import Fleet, Node
from proxy_addon.fleet.polls import Http, PollFailed, fetch

log = logging.getLogger(__name__)

SHOW_TIMEOUT_S = 30.0  #: Ollama reads the head of the model's file for it, perhaps from a sleeping disk
#: What may be a list with a number for each layer (``memory.shape_of``): null unless ``verbose`` is asked.
PER_LAYER = ("attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern")
MOST_LAYERS = 1024  #: no list that is longer has a number for each layer
TRIES = 3  #: per digest; another node may have it as well


class Shapes:
    """Fills ``shapes``, ``modelfiles`` and ``blobs`` of the fleet in the background: nothing waits for it."""

    def __init__(self, fleet: Fleet, http: Http) -> None:
        self._fleet = fleet
        self._http = http
        self._wanted: dict[str, tuple[Node, str]] = {}  #: digest → who may be asked, and for which name
        self._tries: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def want(self, node: Node) -> None:
        """Ask for the shapes of those models of ``node`` that are not known yet."""
        for row in node.models.values():
            if row.digest not in self._fleet.shapes and self._tries.get(row.digest, 0) < TRIES:
                self._wanted.setdefault(row.digest, (node, row.name))
        if self._wanted and (self._task is None or self._task.done()):
            self._task = defects.keep_running("shapes", self._work)

    async def stop(self) -> None:
        """Ask nothing more."""
        self._wanted.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        while self._wanted:
            digest, (node, name) = self._wanted.popitem()
            if digest in self._fleet.shapes or node.poll_error is not None:
                continue
            self._tries[digest] = self._tries.get(digest, 0) + 1
            try:
                told = await self._show(node, {"model": name})
                if blob := blob_of(told.get("modelfile")):
                    self._fleet.blobs[digest] = blob
                if options := options_of(told.get("parameters")):
                    self._fleet.modelfiles[digest] = options
                self._fleet.shapes[digest] = info = dict(told["model_info"])
                if wanted := lacking(info):
                    # Megabytes, for the vocabulary is in it: so only where it says more.
                    whole = (await self._show(node, {"model": name, "verbose": True}))["model_info"]
                    self._fleet.shapes[digest] = info | {
                        key: whole[key] for key in wanted if _small(whole.get(key))
                    }
            except PollFailed as failure:
                log.debug("The shape of %s is not known yet: %s %s.", name, node.name, failure.reason)
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                log.debug("The shape of %s is not known: %s shows no model_info.", name, node.name)

    async def _show(self, node: Node, question: dict[str, Any]) -> dict[str, Any]:
        body = await fetch(self._http, URL(node.url) / "api/show", SHOW_TIMEOUT_S, json=question)
        return dict(await asyncio.to_thread(orjson.loads, body))


def blob_of(modelfile: Any) -> str | None:
    """The hex sha256 of the file that ``modelfile`` of ``/api/show`` names as the model's."""
    found = _FROM.search(modelfile) if isinstance(modelfile, str) else None
    return found[1].lower() if found else None


_FROM = re.compile(r"^FROM\s.*sha256[-:]([0-9a-f]{64})\s*$", re.IGNORECASE | re.MULTILINE)


def options_of(parameters: Any) -> ReloadKey:
    """What ``parameters`` of ``/api/show`` sets of what shapes a runner: a name and a value on each line."""
    found: dict[str, int | bool] = {}
    for line in parameters.splitlines() if isinstance(parameters, str) else ():
        name, _, text = line.strip().partition(" ")
        value = _value(_KIND[name], text.strip().strip('"')) if name in _KIND else None
        if value is not None:
            found[name] = value
    return normal(found)


_KIND = dict(RELOAD_OPTIONS)
_BOOL = {"true": True, "false": False}


def _value(kind: type, text: str) -> int | bool | None:
    if kind is bool:
        return _BOOL.get(text)
    try:
        return int(float(text))  # numbers are written as Go writes floats: 1048576 is 1.048576e+06
    except (ValueError, OverflowError):
        return None


def lacking(info: Mapping[str, Any]) -> list[str]:
    """The keys of ``model_info`` that are wanted and null: lists, which were left out."""
    keys = (f"{info.get('general.architecture')}.{name}" for name in PER_LAYER)
    return [key for key in keys if key in info and info[key] is None]


def _small(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_LAYERS
