"""How many bytes of request bodies are held: of one, and of all at once, each until its request has ended.

What was only announced does not count, or who announces much and sends nothing would keep all others out. It
is checked all the same, so that nobody sends in vain. Nor does what is only passed on, as blobs are.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy_addon import access
from proxy_addon.access import Refusal
from proxy_addon.settings import Settings

RETRY_AFTER_S = 2  #: as with every other 503 (dispatch.py)


@dataclass(slots=True)
class BodyBudget:
    """What all requests may hold together (``guard.buffered_bytes``), and what they do."""

    limit_bytes: int
    held_bytes: int = 0

    def reconfigure(self, settings: Settings) -> None:
        """Go by ``settings`` from now on; what is held stays."""
        self.limit_bytes = settings.guard.buffered_bytes


class Held:
    """What one request holds of ``budget``; ``limit_bytes`` None: it is passed on where that can be done."""

    __slots__ = ("_budget", "_bytes", "_limit_bytes")

    def __init__(self, budget: BodyBudget, limit_bytes: int | None) -> None:
        self._budget = budget
        self._limit_bytes = limit_bytes
        self._bytes = 0

    def announced(self, size_bytes: int) -> Refusal | None:
        """Why a body of ``size_bytes`` could not be held; None if it can, or need not."""
        return self._refusal(size_bytes) if self._limit_bytes is not None else None

    def grow(self, more_bytes: int) -> Refusal | None:
        """Hold ``more_bytes`` as well, or say why they cannot be; then nothing of the body is held any more.

        It is given back at once: others grow at the same moment, and one that is refused makes room for them.
        """
        refusal = self._refusal(more_bytes)
        if refusal is None:
            self._bytes += more_bytes
            self._budget.held_bytes += more_bytes
        else:
            self.let_go()
        return refusal

    def let_go(self) -> None:
        """Give all of it back."""
        self._budget.held_bytes -= self._bytes
        self._bytes = 0

    def _refusal(self, more_bytes: int) -> Refusal | None:
        size_bytes, budget = self._bytes + more_bytes, self._budget
        limit_bytes = self._limit_bytes
        if limit_bytes is not None and size_bytes > limit_bytes:
            return access.too_large(limit_bytes, "guard.body_limit_bytes")
        if budget.held_bytes + more_bytes <= budget.limit_bytes:
            return None
        if size_bytes > budget.limit_bytes:
            return access.too_large(budget.limit_bytes, "guard.buffered_bytes")
        return Refusal(
            503,
            f"the bodies of all requests together are larger than {budget.limit_bytes} bytes"
            " (guard.buffered_bytes); try again shortly",
            {"retry-after": str(RETRY_AFTER_S)},
        )
