"""mitmproxy's AddonManager for a chain that does not change: the hooks of each event are looked up once.

Profiled on small requests, a quarter of the time went into finding hooks: every event walks every addon, and
every flow event is followed by an ``update`` event that nobody here listens to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import isawaitable
from typing import Any

from mitmproxy import exceptions, hooks
from mitmproxy.addonmanager import AddonManager

from proxy_addon import defects

log = logging.getLogger(__name__)

#: A hook, and what is to be called where it raises, if it is one of ours: one frame less for each.
Entry = tuple[Callable[..., Any], Callable[..., Any] | None]


class LeanAddons(AddonManager):
    """Triggers events through a table of hooks, made anew whenever an addon comes or goes."""

    def __init__(self, master: Any) -> None:
        super().__init__(master)  # type: ignore[no-untyped-call]
        self._table: dict[type[hooks.Hook], list[Entry]] = {}

    def register(self, addon: Any) -> Any:
        """As the parent."""
        self._table.clear()
        return super().register(addon)  # type: ignore[no-untyped-call]

    def remove(self, addon: Any) -> None:
        """As the parent."""
        self._table.clear()
        super().remove(addon)  # type: ignore[no-untyped-call]

    async def handle_lifecycle(self, event: hooks.Hook) -> None:
        """As the parent, without the ``update`` event: it serves user interfaces that list flows."""
        await self.trigger_event(event)

    async def trigger_event(self, event: hooks.Hook) -> None:
        """As the parent: every hook in the chain's order; what one raises is logged, the others go on."""
        found = self._table.get(type(event))
        if found is None:
            found = self._table[type(event)] = self._find(event)
        if found:
            await self._run(found, event.name, event.args())

    async def run(self, event: type[hooks.Hook], argument: object) -> None:
        """As :meth:`trigger_event` for an event of one argument, which need not be made if none listens."""
        found = self._table.get(event)
        if found is None:
            found = self._table[event] = self._find(event(argument))
        if found:
            await self._run(found, event.name, (argument,))

    def _find(self, event: hooks.Hook) -> list[Entry]:
        found = [hook for addon in self.chain for _, hook in self._iter_hooks(addon, event)]
        return [(getattr(hook, "bare", hook), getattr(hook, "failed", None)) for hook in found]

    async def _run(self, found: list[Entry], name: str, arguments: Sequence[Any]) -> None:
        for hook, failed in found:
            try:
                result = hook(*arguments)
                if result is not None and isawaitable(result):
                    await result
            except Exception as raised:  # the outermost boundary of a hook
                if failed is not None:
                    await _instead(failed, arguments)
                elif isinstance(raised, exceptions.AddonHalt):
                    return
                elif isinstance(raised, exceptions.OptionsError):
                    raise
                else:
                    log.exception("the hook %s of an addon failed", name)


async def _instead(failed: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """What :mod:`proxy_addon.protect` has in place of a hook that has raised."""
    try:
        pending = failed(*arguments)
        if pending is not None:
            await pending
    except Exception as defect:  # noqa: BLE001 - what there is no other answer to
        defects.report(defect, "instead")
