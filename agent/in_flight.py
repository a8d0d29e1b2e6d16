"""What the proxies have in flight here, as they say themselves: the state that several proxies share.

Each proxy tells its own requests and hears those of all others, as patches of a table: an id with a row sets
it, an id with null removes it. What a proxy told is kept for as long as its connection, so a proxy that ends,
however it does, takes its share along. Pure: time is an argument, connections are ``agent/sharing.py``'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

PATH = "/v1/in-flight"
PACE_S = 0.02  #: between two messages in one direction: a burst is told in one, and nobody is older than this
#: Seconds between two pings. A machine that vanished without closing its connections is found out by the
#: second one; of a process that died the kernel tells at once.
HEARTBEAT_S = 2.0
LONGEST_BYTES = 1 << 20  #: of a message
MOST_PROXIES = 256  #: more than any fleet has, so that a caller who invents names cannot fill the memory
MOST_ROWS = 4096  #: of one proxy: as many requests as it can have on one node, and then some

_PROXY_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=512)]
Id = Annotated[str, Field(max_length=160)]


class Row(BaseModel):
    """One request on this node: what of it matters to where the next goes. No text, and not whose it is."""

    model_config = ConfigDict(frozen=True)

    path: Name = Field(description="of the endpoint")
    model: Name = Field(description="canonical name")
    options: Annotated[dict[Name, int | bool], Field(max_length=16)] = Field(
        {}, description="that shape the runner"
    )
    stream: bool = False
    kind: Name = Field("generation", description="what is asked for: how long answers are is learned by it")
    max_tokens: int | None = None
    age_s: Seconds = Field(0.0, description="since it was sent here")
    answering_s: Seconds | None = Field(None, description="since the first byte of its answer")
    expected_s: Seconds = Field(0.0, description="that it was expected to take, queue and load included")
    service_s: Seconds | None = Field(None, description="of that prefill and decode alone")
    loads: bool = Field(False, description="it is expected to load its model")
    evicts: Annotated[tuple[Name, ...], Field(max_length=64)] = Field((), description="what that drives out")
    waits: Annotated[int, Field(ge=1, le=10)] | None = Field(
        None,
        description="no request but a line for the model at the proxy: the highest priority that waits",
    )
    need_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = Field(0, description="of memory that that takes")

    def aged(self, by_s: float) -> Row:
        """The same request so much later."""
        if by_s <= 0:
            return self
        answering_s = None if self.answering_s is None else self.answering_s + by_s
        return self.model_copy(update={"age_s": self.age_s + by_s, "answering_s": answering_s})


Patch = dict[str, Row | None]  #: id → the row as it is now, None once it is over


class News(BaseModel):
    """What an agent tells a proxy of the others. Ids begin with the proxy's, and a space."""

    others: int = Field(0, description="proxies that share this node")
    rows: dict[Id, Row | None] = {}


PATCH: TypeAdapter[Patch] = TypeAdapter(Annotated[dict[Id, Row | None], Field(max_length=MOST_ROWS)])


def dumped(rows: Patch) -> dict[str, Any]:
    """``rows`` for JSON, without what has its default."""
    return {id_: row and row.model_dump(exclude_defaults=True) for id_, row in rows.items()}


def proxy_id(value: str) -> str:
    """Return ``value`` if it can name a proxy; raise ValueError with a sentence otherwise."""
    if _PROXY_ID.fullmatch(value) is None:
        raise ValueError(f"proxy must be a name of up to 64 letters, digits, _ . or -, not {value[:80]!r}")
    return value


class TooMany(Exception):
    """More than any honest caller has. The text is a sentence."""


@dataclass(eq=False, slots=True)
class Member:
    """One proxy that is connected. ``on_news`` is called when there is something to :meth:`take`."""

    shares: Shares
    proxy_id: str
    on_news: Callable[[], None]
    rows: dict[str, tuple[float, Row]] = field(default_factory=dict)  #: its own: when told, what
    news: dict[str, tuple[float, Row] | None] = field(default_factory=dict)  #: of others, not taken yet
    replaced: bool = False  #: another connection of the same name has taken its place

    def tell(self, patch: Patch, now_s: float) -> None:
        """Take over what the proxy says has changed. Raises TooMany."""
        if self.replaced:
            return
        for id_, row in patch.items():
            if row is not None:
                self.rows[id_] = now_s, row
            elif self.rows.pop(id_, None) is None:
                continue
            self.shares.spread(self, id_)
        if len(self.rows) > MOST_ROWS:
            raise TooMany(f"a proxy has at most {MOST_ROWS} requests on a node")

    def take(self, now_s: float) -> News:
        """What is new of others since the last time."""
        rows = {id_: told and told[1].aged(now_s - told[0]) for id_, told in self.news.items()}
        self.news = {}
        return News.model_construct(others=len(self.shares) - 1, rows=rows)

    def leave(self) -> None:
        """The proxy is gone, and its requests with it; harmless the second time."""
        self.shares.remove(self)


class Shares:
    """Who is connected, and what each has here."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def has_room_for(self, name: str) -> bool:
        """Whether a proxy of this name may join."""
        return name in self._members or len(self._members) < MOST_PROXIES

    def join(self, name: str, on_news: Callable[[], None]) -> Member:
        """Let a proxy share; one of the same name is gone then."""
        if (before := self._members.get(name)) is not None:
            self.remove(before)
            before.replaced = True
            before.on_news()
        member = Member(self, name, on_news)
        for other in self._members.values():
            member.news.update({f"{other.proxy_id} {id_}": told for id_, told in other.rows.items()})
        self._members[name] = member
        self._wake()
        return member

    def remove(self, member: Member) -> None:
        """Forget ``member``, unless another one has taken its place."""
        if self._members.get(member.proxy_id) is not member:
            return
        del self._members[member.proxy_id]
        gone = {f"{member.proxy_id} {id_}": None for id_ in member.rows}
        for other in self._members.values():
            other.news.update(gone)
        self._wake()

    def spread(self, member: Member, id_: str) -> None:
        """Let the others hear what became of a row of ``member``."""
        name, told = f"{member.proxy_id} {id_}", member.rows.get(id_)
        for other in self._others(member):
            other.news[name] = told
            other.on_news()

    def total(self) -> int | None:
        """Requests of all proxies together, None if none is connected."""
        if not self._members:
            return None
        return sum(row.waits is None for member in self._members.values() for _, row in member.rows.values())

    def _others(self, member: Member) -> Iterator[Member]:
        return (other for other in self._members.values() if other is not member)

    def _wake(self) -> None:
        for member in self._members.values():
            member.on_news()
