"""A flow's own record: where the addons meet. It is with the flow, not in what mitmproxy saves of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from mitmproxy import http

from proxy_addon import defects, heads
from proxy_addon.admission.waiter import Waiter
from proxy_addon.ask import Ask
from proxy_addon.body_budget import Held
from proxy_addon.endpoints import Endpoint, Protocol
from proxy_addon.fleet.node import Flight, Node
from proxy_addon.placement.decision import Decision
from proxy_addon.settings import ClientClass, Settings


@dataclass(slots=True)
class FinalStats:
    """What the last object of an answer says of the work done. Seconds; None where the protocol is silent."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    load_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    total_s: float | None = None
    done_reason: str | None = None


@dataclass(slots=True)
class Attempt:
    """One try on one node: when, and how it ended (``ok``, or the retry table's word for the failure)."""

    node: str
    started_s: float
    ended_s: float | None = None
    outcome: str | None = None
    detail: str = ""


@dataclass(slots=True)
class Stream:
    """An answer that the proxy itself makes, piece by piece: its head, and the bytes as they come.

    The iterator is closed (``aclose``) when the client leaves.
    """

    head: http.Response
    chunks: AsyncIterator[bytes]


@dataclass(slots=True)
class Record:
    """One request on its way through the chain. Times are ``loop.time()`` seconds."""

    id: str
    protocol: Protocol
    started_s: float
    client: str  #: address of the client, without port
    endpoint: Endpoint | None = None
    ask: Ask | None = None
    headers: Mapping[str, str] = field(default_factory=dict)  #: as the client sent them; see heads.py
    method: str = ""  #: in upper case
    path: str = ""  #: without query
    settings: Settings | None = None  #: those in force when it came in; it is served under them
    decisions: list[Decision] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    flight: Flight | None = None
    node: Node | None = None  #: the node of the attempt under way
    sent_s: float | None = None  #: when that attempt began
    excluded: dict[str, str] = field(default_factory=dict)  #: node → why it is not tried in this round
    hopeless: dict[str, str] = field(default_factory=dict)  #: node → why it is not tried again at all
    idle_closed: set[str] = field(default_factory=set)  #: nodes that had closed a kept connection
    broken: Counter[str] = field(default_factory=Counter)  #: node → attempts under which it broke
    awaits_until_s: float | None = None  #: how long a coordinator is waited for, once there is nobody else
    rounds: int = 0  #: how often every candidate was tried in vain
    abort_reason: str | None = None  #: why we ourselves ended the attempt (a time limit, a lost node)
    moving: bool = False  #: the attempt is being taken back, to be made on another node
    looked_s: float = 0.0  #: when that was last considered
    left: bool = False  #: the client has gone
    stream: Stream | None = None  #: set by an addon in place of flow.response, for a streamed answer
    placed: bool = False  #: the flow's address is a node that an addon chose; nothing else may be contacted
    held: Held | None = None  #: what its body may take of the proxy's memory, and does
    on_left: list[Callable[[], object]] = field(default_factory=list)  #: called when the client leaves
    queued_s: float | None = None  #: how long it waited in the proxy's own line; None: it never stood there
    queue_position: int | None = None  #: its place there when it came, 1 for the first
    expected_wait_s: float | None = None  #: as it was then
    waiter: Waiter | None = None  #: its place in the line, kept for when it comes back
    client_class: ClientClass | None = None  #: by which the client is known, where it is of one
    client_name: str = ""  #: what it is called then: the name of the class, or its address
    last_byte_s: float | None = None
    first_byte_s: float | None = None
    ended_s: float | None = None
    stats: FinalStats | None = None
    status: int | None = None  #: what the client was sent
    outcome: str | None = None  #: ok, refused (4xx), failed (5xx), cut (in mid-answer), client_left
    shard_plan: str | None = None  #: id of the plan by which a coordinator answered
    origin: str | None = None  #: the browser origin whose page may read the answer

    def client_left(self) -> None:
        """Tell whoever waits on this request's behalf that nobody wants the answer any more."""
        self.left = True
        callbacks, self.on_left = self.on_left, []
        for callback in callbacks:
            try:
                callback()
            except Exception as defect:  # noqa: BLE001 - the others must be told as well
                defects.report(defect, "on_left", self.id)


_IDS = Random()  #: they need not be secret, and the system's own source takes ten times as long
os.register_at_fork(after_in_child=_IDS.seed)


def of(flow: http.HTTPFlow) -> Record | None:
    """The record of ``flow``, None for a flow that the chain has not seen."""
    return getattr(flow, "sollol", None)  # an attribute: saved and copied flows (``get_state``) are without


def open_for(flow: http.HTTPFlow, protocol: Protocol, now_s: float) -> Record:
    """Begin the record of ``flow`` under a fresh request id (16 hex digits)."""
    peer = flow.client_conn.peername
    headers = heads.read(flow.request.headers.fields)
    client = peer[0] if peer else ""
    record = Record(f"{_IDS.getrandbits(64):016x}", protocol, now_s, client, headers=headers)
    record.method = flow.request.method
    flow.sollol = record  # type: ignore[attr-defined]
    return record
