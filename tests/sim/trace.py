"""What a trace is: who asks for what and when, of which fleet, and what befalls its nodes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tests.fakes.store import FakeModel
from tests.sim.hardware import Kind

Befalls = Literal["slow", "fail_fast", "lose_gpu", "recover", "join"]
PAUSE_S = 2.0  #: between an answer and its client's next turn, at least


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. Times are a real machine's seconds; a time scale shortens them.

    A turn of a conversation is sent at ``at_s``, or :data:`PAUSE_S` after the end of the turn ``after`` it,
    whichever is later. ``output_tokens`` is in the prompt too (tests/fakes/tokens.py), where no proxy looks.
    """

    id: str
    at_s: float
    client: str
    model: str
    messages: tuple[dict[str, str], ...] = ()
    texts: tuple[str, ...] = ()  #: to be embedded
    output_tokens: int = 0  #: as generated: the client's limit counts
    num_predict: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    after: str | None = None  #: id of the turn before

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/api/embed" if self.texts else "/api/chat"

    def body(self) -> dict[str, Any]:
        """Return the request's JSON."""
        if self.texts:
            return {"model": self.model, "input": list(self.texts)}
        limit = {} if self.num_predict is None else {"num_predict": self.num_predict}
        more = {"options": {**self.options, **limit}} if self.options or limit else {}
        return {"model": self.model, "messages": list(self.messages), "stream": True, **more}


@dataclass(frozen=True, slots=True)
class Event:
    """What befalls the node ``node`` (its place in the fleet) at ``at_s``."""

    at_s: float
    node: int
    what: Befalls
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Trace:
    """A fleet, what is asked of it, and what befalls it. A node that joins is down until then."""

    name: str
    seed: int
    kinds: tuple[Kind, ...]
    arrivals: tuple[Arrival, ...]
    events: tuple[Event, ...] = ()
    equal: bool = False  #: machines of one kind are exactly equal
    warm: tuple[FakeModel, ...] = ()  #: what every node has loaded before the first request

    @property
    def late(self) -> frozenset[int]:
        """The nodes that are not there from the start."""
        return frozenset(event.node for event in self.events if event.what == "join")
