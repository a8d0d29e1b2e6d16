"""A node as the proxy knows it, and the fleet of them: plain data, no I/O.

``watch.py`` fills in what the polls bring, ``route.py`` takes and drops flights, ``health.py`` decides about
ejection; everything else only reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from agent.report import Model, NodeKind, Report, Resident
from proxy_addon.fleet import slots as served
from proxy_addon.fleet.crowd import Company, Crowd, Mark
from proxy_addon.fleet.health import Health
from proxy_addon.fleet.prefix_cache import PrefixCache, Slot
from proxy_addon.fleet.sessions import NONE, Session

if TYPE_CHECKING:
    from proxy_addon.ask import Ask, ReloadKey
    from proxy_addon.fleet.patience import Patience
    from proxy_addon.placement.view import View

_TURNS = count(1)


@dataclass(eq=False, slots=True)
class Flight:
    """One request in flight on a node. Made by :meth:`Node.take`, ended by :meth:`drop`, once."""

    node: Node
    ask: Ask
    started_s: float
    expected_s: float  #: the decision's whole estimate, queue wait and load included
    first_byte_s: float | None = None
    load: bool = False  #: the decision expects this request to load its model
    service_s: float | None = None  #: of ``expected_s`` prefill and decode alone; None: all of it
    evicts: tuple[str, ...] = ()  #: models that its load is expected to drive out
    need_bytes: int = 0  #: of memory that its load is expected to take
    kept_s: float = 0.0  #: of a place that is kept for a request: how long until that is sent
    slot: Slot | None = None  #: which of the runner's it is expected to take
    cached_tokens: int | None = None  #: of the prompt, expected in the prefix cache; None: nobody knows
    lone: bool = True  #: nobody else was there between its start and its first byte
    mark: Mark | None = None  #: of the node's crowd, at the start or the first byte
    patience: Patience | None = None  #: how long it may take before it is late; see patience.py
    foreign: bool = False  #: another proxy's, of which the node's agent tells; see shares.py

    def answered(self, now_s: float) -> None:
        """The first byte of the answer has come; of one that is not streamed it is the last as well."""
        self.node.advance(now_s)
        self.first_byte_s = now_s
        if self.ask.stream:
            self.mark = self.node.crowd.mark(self.ask.key)
        self._changed()

    def company(self, now_s: float) -> Company:
        """What it ran beside while its answer came; since its start, where that is not streamed."""
        node = self.node
        node.advance(now_s)
        return node.crowd.since(self.mark, self.ask.key) if self.mark is not None else Company()

    def drop(self, output_tokens: int = 0, now_s: float | None = None) -> None:
        """Take the request off the node, which has answered with so many tokens; harmless the second time."""
        node = self.node
        if self not in node.flights:
            return
        if now_s is not None:
            node.advance(now_s)
            if not self.foreign:
                served.ended(self, now_s)
        self.cancel()
        if self.slot is not None:
            self.slot.ended(self.ask.prefix, output_tokens)
        self._changed()
        if node.on_freed is not None:
            node.on_freed()

    def cancel(self) -> None:
        """Take what was reserved off the node, as if it had never been there."""
        node, key = self.node, self.ask.key
        node.flights.discard(self)
        node.work_s = node.work_s - self._work_s if node.flights else 0.0
        node.in_use[key] = left = node.in_use[key] - 1
        if not left:
            node.in_use.pop(key)

    def _changed(self) -> None:
        """Let other proxies hear of it."""
        if self.node.on_flight is not None and not self.foreign:
            self.node.on_flight(self)

    @property
    def _work_s(self) -> float:
        return self.expected_s if self.service_s is None else self.service_s


@dataclass(eq=False, slots=True)
class Node:
    """One Ollama server (or coordinator) of the fleet. Times are ``loop.time()`` seconds."""

    host: str
    port: int
    kind: NodeKind = "ollama"
    agent_url: str | None = None
    source: str = "config"  #: who named it: config, --nodes, OLLAMA_HOST, mdns, dns, local
    parallel: int = 1  #: OLLAMA_NUM_PARALLEL, which Ollama does not report; 1 until learned
    parallel_known: bool = False  #: the configuration says it: nothing is learned about it
    priority: int = 5  #: only the policy ``score`` reads it, as the seed does
    preferred_tasks: frozenset[str] = frozenset()

    version: str | None = None
    models: dict[str, Model] = field(default_factory=dict)  #: by canonical name
    resident: dict[str, Resident] = field(default_factory=dict)  #: by canonical name
    sessions: Mapping[str, Session] = NONE  #: of what is in memory: who goes first when room is needed
    report: Report | None = None
    report_s: float | None = None  #: when the report arrived
    polled_s: float | None = None  #: last good poll of its Ollama
    poll_error: str | None = None
    poll_latency_s: float | None = None
    health: Health = field(default_factory=Health)
    leaving: bool = False  #: its name or announcement is gone: no new work; removed once idle
    flights: set[Flight] = field(default_factory=set)  #: of every proxy, as far as they can be seen
    foreign: dict[str, Flight] = field(default_factory=dict)  #: those of other proxies, by their agent's id
    in_use: Counter[str] = field(default_factory=Counter)
    #: flights by model, of those that have some; kept by take and drop alone
    work_s: float = 0.0  #: that all flights were expected to be worked on; kept by take and drop alone
    loaded_with: dict[str, ReloadKey] = field(default_factory=dict)
    #: canonical name → the reload key of the last request that we sent there for it; none of another runner
    loads: set[str] = field(default_factory=set)  #: models whose load we have caused and no poll has shown
    prefixes: PrefixCache = field(default_factory=PrefixCache)
    crowd: Crowd = field(default_factory=Crowd)
    trials: served.Trials = field(default_factory=served.Trials)
    full_until_s: float = 0.0  #: it said 503 lately: full, whatever else it looks like
    unfit_until_s: dict[str, float] = field(default_factory=dict)  #: canonical name → out of memory there
    pinned: frozenset[str] = frozenset()  #: canonical names of what should stay in its memory (replicas/)
    turn: int = 0  #: grows with each request given to any node: who has the smallest waits longest
    on_freed: Callable[[], None] | None = None  #: called when a request was taken off; set by the fleet
    on_flight: Callable[[Flight], None] | None = None
    #: called with a flight of our own that was taken, answered or dropped; set by its share

    @property
    def own_flights(self) -> int:
        """How many of the flights are this proxy's."""
        return len(self.flights) - len(self.foreign)

    @property
    def name(self) -> str:
        """``host:port``, the node's identity towards users, unique in a fleet."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL of its Ollama."""
        return f"http://{self.name}"

    @property
    def coordinator(self) -> bool:
        """Whether it runs models over several nodes: its report says so, and its kind before the first one.

        A ``sollol shard serve`` whose report has no ``shard`` is a node like any other.
        """
        return self.kind == "shard" if self.report is None else self.report.shard is not None

    def up(self, now_s: float) -> bool:
        """Whether it answered its last poll, is not ejected and not on its way out."""
        answers = self.polled_s is not None and self.poll_error is None
        return answers and not self.leaving and not self.health.ejected(now_s)

    def take(
        self,
        ask: Ask,
        now_s: float,
        expected_s: float,
        load: bool = False,
        service_s: float | None = None,
        slots: int | None = None,
        evicts: tuple[str, ...] = (),
        need_bytes: int = 0,
    ) -> Flight:
        """Count a request as in flight here until its handle is dropped.

        ``slots`` is how many the model's runner has, where that is not ``parallel``.
        """
        flight = Flight(self, ask, now_s, expected_s, None, load, service_s, evicts, need_bytes)
        if load:
            self._begin_load(ask.key)
        if ask.prefix:
            flight.cached_tokens = self.prefixes.cached_tokens(ask.key, ask.prefix)
        flight.slot = self.prefixes.note(ask.key, ask.prefix, slots or self.parallel)
        for other in self.flights:
            flight.lone = False
            if other.first_byte_s is None:
                other.lone = False
        self.advance(now_s)
        flight.mark = self.crowd.mark(ask.key)
        self._count(flight)
        served.taken(self, flight, now_s)
        flight._changed()
        return flight

    def see(self, id_: str, flight: Flight, now_s: float) -> None:
        """Count a request that another proxy has in flight here, until it is :meth:`missed <miss>`."""
        if flight.load:
            self._begin_load(flight.ask.key)
        for other in self.flights:
            if other.first_byte_s is None:
                other.lone = False
        self.advance(now_s)
        self.foreign[id_] = flight
        self._count(flight)

    def miss(self, id_: str, now_s: float) -> None:
        """Another proxy's request is over; harmless where it is not known."""
        flight = self.foreign.pop(id_, None)
        if flight is not None:
            flight.drop(0, now_s)

    def _begin_load(self, key: str) -> None:
        if key not in self.loads:
            self.loads.add(key)
            self.prefixes.forget(key)

    def _count(self, flight: Flight) -> None:
        key = flight.ask.key
        self.flights.add(flight)
        self.in_use[key] = self.in_use.get(key, 0) + 1  # what is missing is slow to find in a Counter itself
        self.work_s += flight._work_s
        self.turn = next(_TURNS)

    def reserve(
        self,
        ask: Ask,
        now_s: float,
        expected_s: float,
        load: bool,
        service_s: float | None,
        evicts: tuple[str, ...] = (),
        need_bytes: int = 0,
        kept_s: float = 0.0,
    ) -> Flight:
        """Let decisions see a request here that may come in ``kept_s``, until its handle is cancelled."""
        flight = Flight(self, ask, now_s, expected_s, None, load, service_s, evicts, need_bytes, kept_s)
        self.flights.add(flight)
        self.in_use[ask.key] = self.in_use.get(ask.key, 0) + 1
        self.work_s += flight._work_s
        return flight

    def drives_out(self, key: str) -> bool:
        """Whether the model ``key`` is about to go: a load under way is waiting for its requests to end.

        Ollama lets others use it until then, but each of them keeps that load waiting, and all behind it.
        """
        return any(key in flight.evicts for flight in self.flights if flight.first_byte_s is None)

    def advance(self, now_s: float) -> None:
        """Keep the sums of what is decoded here up to ``now_s``; before each change of it.

        Who has no first byte yet may wait for a load or a slot. Of answers in one piece nobody can tell.
        """
        if now_s == self.crowd.at_s:
            return  # the loop's clock stands still while a callback runs
        decoded: dict[str, int] = {}
        for flight in self.flights:
            if flight.first_byte_s is not None or not (flight.ask.stream or flight.load):
                decoded[flight.ask.key] = decoded.get(flight.ask.key, 0) + 1
        self.crowd.advance(decoded, self.parallel, now_s)

    def holds(self, resident: dict[str, Resident]) -> None:
        """Take over what is in its memory, and forget what was known of runners that are gone.

        One that went or changed because of a load of ours is not among them: what is known is of the new one.
        """
        before, self.resident = self.resident, resident
        for key, row in before.items():
            now = resident.get(key)
            changed = now is None or now.context_length != row.context_length
            if changed and key not in self.loads:
                self.prefixes.forget(key)
                self.loaded_with.pop(key, None)
        self.loads &= {f.ask.key for f in self.flights if f.load and f.first_byte_s is None}


@dataclass(eq=False, slots=True)
class Fleet:
    """All nodes by name, and who wants to know when one is lost."""

    nodes: dict[str, Node] = field(default_factory=dict)
    on_lost: list[Callable[[Node, str], None]] = field(default_factory=list)
    #: called with (node, reason) when a node stops answering polls: what it holds unanswered must move
    on_news: list[Callable[[Node], None]] = field(default_factory=list)
    #: called with a node that reported, came (back), or has other models than before, on disk or in memory
    on_freed: list[Callable[[], None]] = field(default_factory=list)
    #: called when a request was taken off a node: somebody else may have its slot
    line: dict[str, int] = field(default_factory=dict)  #: model → highest priority that waits in our line
    lines: dict[str, tuple[str, int]] = field(default_factory=dict)  #: of other proxies: model, priority
    on_line: list[Callable[[], None]] = field(default_factory=list)  #: called when ``line`` has changed
    on_seen: list[Callable[[Ask], None]] = field(default_factory=list)
    #: called with what another proxy was asked, once it is on a node
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: digest → ``model_info`` of ``/api/show``, filled in the background; arrays that nobody reads are null
    modelfiles: dict[str, ReloadKey] = field(default_factory=dict)
    #: digest → what the Modelfile sets of what shapes a runner; those that set nothing of it are left out
    blobs: dict[str, str] = field(default_factory=dict)  #: digest → hex sha256 of the model's own file
    views: dict[str, View] = field(default_factory=dict)
    #: canonical name → what placement has worked out of who may serve it
    pins: list[dict[str, Any]] = field(default_factory=list)  #: how each pin stands, for the status
    replicas: list[dict[str, Any]] = field(default_factory=list)  #: those that we made ourselves

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def add(self, node: Node) -> Node:
        """Add ``node``, or return the one already known under its name."""
        known = self.nodes.setdefault(node.name, node)
        known.on_freed = self._freed
        return known

    def remove(self, node: Node) -> None:
        """Forget ``node``; harmless if it is no longer known."""
        if self.nodes.get(node.name) is node:
            del self.nodes[node.name]

    def find(self, host: str, port: int) -> Node | None:
        """The node that listens at ``host:port``, None for any other address."""
        return self.nodes.get(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def up(self, now_s: float) -> list[Node]:
        """The nodes that may be sent work."""
        return [node for node in self if node.up(now_s)]

    def holders(self, key: str, now_s: float) -> list[Node]:
        """Nodes that are up and store the model ``key`` (canonical) at the digest the fleet serves."""
        digest = self.digest(key)
        return [n for n in self.up(now_s) if key in n.models and n.models[key].digest == digest]

    def digest(self, key: str) -> str | None:
        """The digest that the fleet serves for ``key``: the newest, where nodes differ."""
        rows = [node.models[key] for node in self if key in node.models and node.poll_error is None]
        if not rows:
            return None
        if all(row.digest == rows[0].digest for row in rows):
            return rows[0].digest
        return max(rows, key=lambda row: row.modified_at).digest

    def usual(self, key: str) -> ReloadKey:
        """The options that a request for the model ``key`` has where it names none: its Modelfile's."""
        return self.modelfiles.get(self.digest(key) or "", ()) if self.modelfiles else ()

    def nobody_stores(self, key: str) -> bool:
        """Whether no node that could be asked has the model ``key``: then it does not exist here."""
        return not any(key in node.models for node in self)

    def _freed(self) -> None:
        for callback in self.on_freed:
            callback()

    def waits(self, line: dict[str, int]) -> None:
        """Let other proxies know for which models some wait here, and how urgently."""
        if line != self.line:
            self.line = line
            for callback in self.on_line:
                callback()

    def waits_elsewhere(self, key: str) -> int | None:
        """The highest priority that waits for the model ``key`` at another proxy; None: nobody does."""
        if not self.lines:
            return None
        return max((priority for model, priority in self.lines.values() if model == key), default=None)

    def seen(self, ask: Ask) -> None:
        """Tell whoever counts what is asked for that another proxy was asked."""
        for callback in self.on_seen:
            callback(ask)

    def news(self, node: Node) -> None:
        """Tell everybody who reads what ``node`` says of itself."""
        for callback in self.on_news:
            callback(node)

    def lost(self, node: Node, reason: str) -> None:
        """Tell everybody who waits for ``node`` that it is gone."""
        for callback in self.on_lost:
            callback(node, reason)


def names(nodes: Iterable[Node]) -> str:
    """``nodes`` for a sentence: their names, comma-separated."""
    return ", ".join(node.name for node in nodes) or "none"
