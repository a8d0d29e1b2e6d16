"""How fast nodes are, learned from what Ollama says at the end of each answer; kept over restarts.

A speed is looked for in this order: measured for this model on this node; the hardware's promise
(hardware.py) times how far this node's other models were above or below theirs; the promise times the best
such correction in the fleet and ``OPTIMISM``. The last makes a machine that nobody has measured look better
than the best of its kind, so that it is tried once and then judged by its own work (optimism in the face of
uncertainty, as in UCB).

Speeds are means of logarithms with forgetting: a node that is three times slower for once moves its estimate
as far as one that is three times faster. Measured decode speeds are brought to the standard of "alone, wholly
on the accelerator" and are predicted from there, so that one measurement serves all loads.
What has changed for good is believed after two answers (measured.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agent.report import Report, ShardModel
from proxy_addon.fleet import evidence, hardware, lessons
from proxy_addon.fleet.coordinators import priors
from proxy_addon.fleet.demand import Demand
from proxy_addon.fleet.hardware import Hardware
from proxy_addon.fleet.lengths import Lengths, OutputLengths
from proxy_addon.fleet.measured import (
    PRIOR_FAILURE,
    ModelOnNode,
    OfModel,
    OfNode,
    Rate,
    State,
)
from proxy_addon.placement.memory import NOTHING_SEEN, Room, room_of

if TYPE_CHECKING:
    from proxy_addon.ask import Ask
    from proxy_addon.fleet.node import Node
    from proxy_addon.record import FinalStats

OPTIMISM = 1.5  #: enough to outweigh noise and a small difference in failures, too little to outweigh a load
MOVED = 0.02  #: of a speed (in logarithms) or slowdown: less is noise, and no reason to work out all anew
MAX_SIZES = 16  #: contexts of which a model's size is kept: clients choose them
DOUBTFUL = 0.1  #: probability of failure above which a node is tried by ourselves; see probe.py
LOST_S = 1.0  #: what a failed attempt costs at least: a retry of a limited budget, a cold prefix cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """The speeds to expect of one model on one node, alone and wholly on its accelerator."""

    prefill_tok_s: float
    decode_tok_s: float
    load_s: float
    load_bytes_s: float
    hardware: Hardware  #: what the estimate was made from
    size_bytes: int
    prior: ShardModel | None = None  #: as well, on a coordinator


@dataclass(frozen=True, slots=True)
class Machine:
    """What was read from a node's newest report, whichever the model."""

    report: Report | None
    hardware: Hardware
    room: Room | None  #: None without a report
    sharded: dict[str, ShardModel]  #: what a coordinator expects of its models, by canonical name
    gpu_free_bytes: int = 0
    gpu_total_bytes: int = 0
    cpu_utilisation: float | None = None


_UNMEASURED = OfNode()


class Speeds:
    """All that was learned. ``estimate`` and the readers are cheap; ``observe`` is called once a request."""

    def __init__(self, state: State | None = None) -> None:
        state = state or State()
        self.nodes = state.nodes
        self.models = state.models
        self.lengths = OutputLengths(state.lengths)
        self.demand = Demand()
        self._stamps: Counter[str] = Counter()
        self._told: dict[tuple[str, str], tuple[float, ...]] = {}  # node, model → what its stamp stands for
        self._cache: dict[str, dict[str, Estimate]] = {}  # model → node → estimate
        self._machines: dict[str, Machine] = {}
        self._load_bytes_s = evidence.typical_load_bytes_s(self.nodes.values())  #: where none was measured
        self._best: dict[bool, tuple[float, float]] = {}
        #: known hardware? → the best (prefill, decode) correction
        for known in (False, True):
            self._compare(known)

    @classmethod
    def load(cls, path: Path) -> Speeds:
        """The speeds saved at ``path``; none where there is no such file or a broken one (``State.load``)."""
        return cls(State.load(path))

    def save(self, path: Path) -> None:
        """Keep the speeds at ``path``, atomically. Raises OSError. May be called from another thread."""
        self._state().save(path)

    def to_json(self) -> bytes:
        """All that was learned, for :meth:`from_json`."""
        return self._state().to_json()

    @classmethod
    def from_json(cls, text: bytes) -> Speeds:
        """The inverse of :meth:`to_json`. Raises ValueError for anything else."""
        return cls(State.from_json(text))

    def _state(self) -> State:
        return State(nodes=self.nodes, models=self.models, lengths=self.lengths.tables)

    # what is expected

    def machine(self, name: str, report: Report | None) -> Machine:
        """What ``report``, the newest of the node ``name``, says of its hardware and memory."""
        seen = self._machines.get(name)
        if seen is None or seen.report is not report:
            promise, room = hardware.of(report), room_of(report) if report else None
            if seen is not None and seen.hardware == promise:
                promise = seen.hardware  # the same object, by which estimates know that they are still good
            gpus = report.gpus if report else ()
            seen = self._machines[name] = Machine(
                report,
                promise,
                room,
                priors(report),
                sum(gpu.memory_free_bytes for gpu in gpus),
                sum(gpu.memory_total_bytes for gpu in gpus),
                report.host.cpu_utilisation if report else None,
            )
        return seen

    def estimate(self, name: str, machine: Machine, key: str, size_bytes: int) -> Estimate:
        """The speeds of the model ``key`` of ``size_bytes`` on the node ``name``, which is ``machine``."""
        cache = self._cache.setdefault(key, {})
        found = cache.get(name)
        if (
            found is None
            or found.hardware is not machine.hardware
            or found.size_bytes != size_bytes
            or found.prior != machine.sharded.get(key)
        ):
            prior = machine.sharded.get(key)
            found = cache[name] = self._estimate(name, machine.hardware, key, size_bytes, prior)
        return found

    def stamp(self, name: str) -> int:
        """A number that grows with all that is learned of the node ``name``, or of others with effect on it.

        Whoever keeps what follows from speeds and failures sees by it whether it still holds.
        """
        return self._stamps[name] + self._stamps[""]

    def output_tokens(self, ask: Ask) -> float:
        """Tokens that the answer to ``ask`` is expected to have."""
        return self.lengths.of(ask).mean

    def output(self, ask: Ask) -> Lengths:
        """How many tokens the answer to ``ask`` may have, as a distribution."""
        return self.lengths.of(ask)

    def prompt_tokens(self, ask: Ask) -> float:
        """Tokens that the prompt of ``ask`` is expected to have."""
        model = self.models.get(ask.key)
        return ask.prompt_tokens * (model.prompt_ratio.value if model else 1.0)

    def sizes(self, key: str) -> Mapping[int, float]:
        """What the model ``key`` was seen to take: the tokens that it could hold then → bytes in memory."""
        model = self.models.get(key)
        if model is None or not model.sizes:
            return NOTHING_SEEN
        return {tokens: size.value for tokens, size in model.sizes.items()}

    def slowdown(self, name: str, beside: float, runners: float = 0.0) -> float:
        """How many times longer a token takes on the node ``name`` than alone.

        That is with ``beside`` other sequences of the same model, and ``runners`` other models at work.
        """
        return lessons.slowdown(self.nodes.get(name) or _UNMEASURED, beside, runners)

    def lost_s(self, name: str) -> float:
        """Seconds that a failed attempt on the node ``name`` costs, besides its share of the work."""
        node = self.nodes.get(name)
        return LOST_S + (node.lost_s.value if node else 0.0)

    def success_rate(self, name: str, now_s: float) -> float:
        """Share of the requests of the node ``name`` that succeed."""
        node = self.nodes.get(name)
        return 1 - (node.outcomes.failure(now_s) if node else PRIOR_FAILURE)

    def doubt(self, name: str, now_s: float) -> Literal["slow", "failing"] | None:
        """Why the node ``name`` might be better than it is believed to be: it once was."""
        node = self.nodes.get(name)
        if node is None:
            return None
        if node.outcomes.failure(now_s) > DOUBTFUL:
            return "failing"
        return "slow" if any(model.decode_tok_s.fallen for model in node.models.values()) else None

    def has_decoded(self, name: str, key: str) -> bool:
        """Whether the model ``key`` has generated on the node ``name``."""
        node = self.nodes.get(name)
        return node is not None and key in node.models and node.models[key].decode_tok_s.n > 0

    def surprised(self, name: str, key: str) -> bool:
        """Whether the last answer of the model ``key`` there was far from the expected, or as it once was."""
        rate = self.nodes[name].models[key].decode_tok_s
        return rate.odd is not None or not rate.fallen

    def _estimate(
        self, name: str, promise: Hardware, key: str, size_bytes: int, prior: ShardModel | None
    ) -> Estimate:
        learned = self.nodes.get(name) or OfNode()
        model = learned.models.get(key) or ModelOnNode()
        best = self._best.get(promise.known, (1.0, 1.0))
        own = learned.prefill.measured, learned.decode.measured
        prefill, decode = (
            mine if mine and learned.known == promise.known else other
            for mine, other in zip(own, best, strict=True)
        )
        prefill_tok_s = model.prefill_tok_s.measured or promise.prefill_tok_s(size_bytes) * prefill
        decode_tok_s = model.decode_tok_s.measured or promise.decode_tok_s(size_bytes) * decode
        load_bytes_s = learned.load_bytes_s.measured or self._load_bytes_s
        load_s = model.load_s.measured or size_bytes / load_bytes_s
        if prior is not None:  # of the plan over several machines, of which the hardware knows but one
            prefill_tok_s = model.prefill_tok_s.measured or prior.prefill_tok_s or prefill_tok_s
            decode_tok_s = model.decode_tok_s.measured or prior.decode_tok_s or decode_tok_s
            load_s = model.load_s.measured or prior.load_s or load_s
        return Estimate(prefill_tok_s, decode_tok_s, load_s, load_bytes_s, promise, size_bytes, prior)

    # what is learned

    def observe(
        self,
        node: Node,
        ask: Ask,
        stats: FinalStats | None,
        first_byte_s: float,
        total_s: float,
        concurrency: float,
        now_s: float,
        *,
        runners: float = 0.0,
        cached_tokens: int | None = None,
        lone: bool | None = None,
        probe: bool = False,
    ) -> None:
        """Learn from an answer that ended well.

        ``first_byte_s`` and ``total_s`` count from the moment the request was sent to ``node``;
        ``concurrency`` is how many requests for the model were in flight there, this one included, and
        ``runners`` how many other models were at work, both on average. ``cached_tokens`` of the prompt were
        expected in the prefix cache (None: not known). ``lone``: nobody else was there before the first
        byte. A ``probe`` of the proxy's own says nothing of clients.
        """
        name = node.name
        learned = self.nodes.get(name)
        if learned is None:
            learned = self.nodes[name] = OfNode()
        learned.outcomes.add(False, now_s)
        row = node.models.get(ask.key)
        if stats is None or row is None or ask.unload:
            return
        machine = self.machine(name, node.report).hardware
        if learned.known != machine.known:  # an agent came or went: the corrections relate to another promise
            learned.known, learned.prefill, learned.decode = machine.known, Rate(), Rate()
        here = learned.models.get(ask.key)
        if here is None:
            here = learned.models[ask.key] = ModelOnNode()
        if not probe:
            self._of_model(ask, stats)
        decode_tok_s = evidence.decode_tok_s(ask, stats, first_byte_s, total_s)
        slowed = evidence.offload(node, ask.key, machine)
        # What is expected in the cache is counted as prompts are before they are sent: by estimate.
        cached_share = min((cached_tokens or 0) / max(ask.prompt_tokens, 1), 1.0)
        prefill = evidence.prefill_tok_s(stats, cached_share, decode_tok_s)
        if prefill is not None:
            promised = None if node.coordinator else machine.prefill_tok_s(row.size)
            bounds = prefill[0] * slowed, prefill[1] * slowed
            lessons.prefill(learned, here, bounds, cached_tokens is not None, promised)
        if decode_tok_s:
            promised = None if node.coordinator else machine.decode_tok_s(row.size)
            beside = max(min(concurrency, node.parallel) - 1, 0.0)
            lessons.decode(learned, here, decode_tok_s * slowed, beside, runners, promised)
        # Ollama's load_duration includes waiting for other requests, so only a lone one tells of the load.
        load_bytes_s = evidence.load_bytes_s(stats, row.size)
        if load_bytes_s and stats.load_s and (concurrency <= 1 if lone is None else lone):
            here.load_s.add(stats.load_s)
            learned.load_bytes_s.add(load_bytes_s)
            self._load_bytes_s = evidence.typical_load_bytes_s(self.nodes.values())
            self._cache.clear()  # whoever has not loaded anything yet is expected to load so fast
            self._stamps[""] += 1
        self._tell(name, ask.key, learned, here)

    def observe_failure(self, name: str, lost_s: float, now_s: float) -> None:
        """Learn that an attempt on the node ``name`` failed after ``lost_s``."""
        learned = self.nodes.setdefault(name, OfNode())
        self._stamps[name] += 1
        learned.outcomes.add(True, now_s)
        learned.lost_s.add(max(lost_s, 0.0))

    def observe_size(self, key: str, tokens: int, size_bytes: int) -> None:
        """Learn how much memory the model ``key`` takes where it can hold ``tokens`` (all its sequences)."""
        if size_bytes <= 0 or tokens <= 0:
            return
        sizes = self.models.setdefault(key, OfModel()).sizes
        size = sizes.pop(tokens, None) or Rate()
        size.add(size_bytes)
        sizes[tokens] = size  # at the end: who was seen longest ago is forgotten first
        if len(sizes) > MAX_SIZES:
            del sizes[next(iter(sizes))]

    def _of_model(self, ask: Ask, stats: FinalStats) -> None:
        model = self.models.get(ask.key)
        if model is None:
            model = self.models[ask.key] = OfModel()
        if stats.output_tokens is not None:
            self.lengths.observe(ask, stats.output_tokens)
        if stats.prompt_tokens and ask.prompt_tokens >= evidence.MIN_PREFILL_TOKENS and not ask.images:
            model.prompt_ratio.add(min(max(stats.prompt_tokens / ask.prompt_tokens, 0.25), 4.0))

    def _tell(self, name: str, key: str, learned: OfNode, here: ModelOnNode) -> None:
        """Let decisions read the speeds anew, if they have moved since they were last told to."""
        now = (
            *(here.prefill_tok_s.log, here.decode_tok_s.log, here.load_s.log),
            *(learned.prefill.log, learned.decode.log, learned.load_bytes_s.log),
            *(learned.crowding.value, learned.sharing.value),
        )
        told = self._told.get((name, key))
        if told is None or any(abs(new - old) > MOVED for new, old in zip(now, told, strict=True)):
            self._told[name, key] = now
            self._stamps[name] += 1
            self._forget_estimates(name, learned.known)

    def _forget_estimates(self, name: str, known: bool) -> None:
        if self._compare(known):
            self._stamps[""] += 1
            self._cache.clear()  # every unmeasured node is compared with the best one
        else:
            for estimates in self._cache.values():
                estimates.pop(name, None)

    def _compare(self, known: bool) -> bool:
        """Find the best corrections; returns whether they differ by more than noise from those in use."""
        best = _best(node for node in self.nodes.values() if node.known == known)
        before = self._best.get(known, (1.0, 1.0))
        if all(abs(math.log(new / old)) <= 0.05 for new, old in zip(best, before, strict=True)):
            return False
        self._best[known] = best
        return True


def _best(nodes: Iterable[OfNode]) -> tuple[float, float]:
    prefill, decode = [], []
    for node in nodes:
        if node.prefill.n:
            prefill.append(node.prefill.value)
        if node.decode.n:
            decode.append(node.decode.value)
    return OPTIMISM * max(prefill) if prefill else 1.0, OPTIMISM * max(decode) if decode else 1.0
