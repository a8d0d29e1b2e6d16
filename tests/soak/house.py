"""The fleet of the soak: who has which models, and the proxy's settings. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

WIDE = "wide"  #: on every node
PAIR = "pair"  #: on two
LONE = "lone"  #: on one
EMBED = "some-embed"  #: on three; it only embeds
FLEETING = ("fleeting-a", "fleeting-b", "fleeting-c")  #: pulled and deleted under way
MADE = "made"  #: created under way, from ``wide``, and deleted

#: How often clients ask for each; the rare ones are those whose only node is often out.
SHARES = {WIDE: 50, PAIR: 16, LONE: 6, EMBED: 14, MADE: 2, **dict.fromkeys(FLEETING, 4)}

SLOTS = 8


@dataclass(frozen=True)
class House:
    """One node: the models it always has, and what reports for it."""

    models: tuple[str, ...]
    agent: Literal["fake", "real", "none"]

    def arguments(self) -> tuple[str, ...]:
        """Those of ``tests.soak.node``."""
        return ("--models", ",".join(self.models), "--slots", str(SLOTS))


HOUSES = (
    House((WIDE, PAIR, EMBED), "fake"),
    House((WIDE, EMBED), "real"),
    House((WIDE, PAIR), "none"),
    House((WIDE, LONE), "fake"),
    House((WIDE, EMBED), "none"),
    House((WIDE,), "fake"),
)

#: Of the proxy. Its limits are short enough for a soak to see them act, and all are bounded, so that a
#: request's own limit (``outcome.LIMIT_S``) can be told from them.
SETTINGS: dict[str, Any] = {
    "discovery": {"mdns": False, "ollama_host": False, "localhost": False, "agents": False},
    "poll": {"interval_s": 0.5, "timeout_s": 2.0},
    "timeouts": {
        "first_byte_s": 20.0,
        "load_s": 10.0,
        "whole_answer_s": 30.0,
        "idle_s": 20.0,
        "drain_s": 20.0,
    },
    "admission": {"max_wait_s": 45.0},
}
