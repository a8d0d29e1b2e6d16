"""What was measured of nodes and models: plain data that fades, and the file that outlives a restart."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from proxy_addon.fleet.lengths import Histogram

log = logging.getLogger(__name__)

GAIN = 0.2  #: weight of the newest measurement once there are five
NOISE_GAIN = 0.1
SETTLED = 2  #: measurements after which one can be said to be far off
FAR = math.log(1.5)  #: a smaller deviation is never more than noise
NOISES = 4.0  #: nor is one of fewer mean deviations
HALF_LIFE_S = 600.0  #: outcomes of requests are half forgotten after ten minutes
OUTCOMES_KEPT = (
    0.95  #: of all before, with each request: a node that works again is believed after a few dozen
)
NEIGHBOUR_SLOWDOWN = 0.25  #: per sequence beside: decoding shares the reading of weights, not the arithmetic
RUNNER_SLOWDOWN = 1.0  #: per other model at work: a GPU gives processes its time in turn (NVIDIA on MPS)
PRIOR_SLOWDOWNS = 4  #: measurements that these two count as
PRIOR_OUTCOMES = 10.0  #: a new node counts as one that failed in PRIOR_FAILURE of so many requests
PRIOR_FAILURE = 0.01

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-700, le=700)]  #: a logarithm whose exp is a float
Positive = Annotated[float, Field(allow_inf_nan=False, ge=0)]


@dataclass(slots=True)
class Rate:
    """A positive quantity as the mean of its logarithm, with forgetting.

    What is far off twice in a row, in the same direction, is no noise: then the mean begins anew from these
    two. One alone moves nothing.
    """

    log: Finite = 0.0
    n: NonNegativeInt = 0
    noise: Positive = 0.0  #: mean deviation, of logarithms
    odd: Finite | None = None  #: the last measurement, where that was far off
    past: Finite | None = None  #: the mean before it fell, until it has come back

    @property
    def value(self) -> float:
        """The mean; 1 before the first measurement."""
        return math.exp(self.log)

    @property
    def measured(self) -> float | None:
        """The mean; None before the first measurement."""
        return math.exp(self.log) if self.n else None

    @property
    def fallen(self) -> bool:
        """Whether it is far below what it was before."""
        return self.past is not None

    def add(self, value: float, weight: float = 1.0) -> float:
        """Take in one measurement, which must be positive and counts ``weight``, 1 at most.

        Returns by how much the mean was moved because the quantity itself has changed; 0 most of the time.
        """
        log = math.log(value)
        off = log - self.log
        if self.n >= SETTLED and abs(off) > max(FAR, NOISES * self.noise):
            if self.odd is not None and (self.odd > self.log) == (off > 0):
                return self._begin_anew((self.odd + log) / 2)
            self._was_noise()
            self.odd = log
            return 0.0
        self._was_noise()
        if self.n:
            self.noise += (abs(off) - self.noise) * NOISE_GAIN
        self.n += 1
        self._move(off * weight * max(1 / self.n, GAIN) if self.n > 1 else off)
        return 0.0

    def add_between(self, low: float, high: float, gain_up: float = 1.0) -> float:
        """Take in a measurement that is known to lie between ``low`` and ``high``; see :meth:`add`.

        ``gain_up`` is how much one above the mean counts that may be too high after all.
        """
        if not self.n:
            return self.add(math.sqrt(low * high))
        if self.log > math.log(high):
            return self.add(high)
        if self.log >= math.log(low):
            self._was_noise()
            self.n += 1
            return 0.0
        if gain_up < 1:
            self.n += 1
            self._move((math.log(low) - self.log) * gain_up)
            return 0.0
        return self.add(low)

    def shift(self, by: float) -> None:
        """Follow another quantity that has changed for a reason which they share."""
        if not self.n:
            return
        if by > 0:  # back, and not beyond what it was
            by = min(by, max(self.past - self.log, 0.0)) if self.past is not None else 0.0
        elif self.past is None:
            self.past = self.log
        self._move(by)

    def _begin_anew(self, log: float) -> float:
        moved = log - self.log
        if moved < 0 and self.past is None:
            self.past = self.log
        self.n, self.odd = SETTLED, None
        self._move(moved)
        return moved

    def _move(self, by: float) -> None:
        self.log += by
        if self.past is not None and self.log > self.past - FAR:
            self.past = None

    def _was_noise(self) -> None:
        """The measurement before was far off, but was not followed by another like it."""
        if self.odd is not None:
            self.noise += (abs(self.odd - self.log) - self.noise) * NOISE_GAIN
            self.odd = None


@dataclass(slots=True)
class Mean:
    """A mean with forgetting, for quantities that may be zero and whose sum matters."""

    value: Positive = 0.0
    n: NonNegativeInt = 0

    def add(self, value: float, gain: float = GAIN) -> None:
        """Take in one measurement."""
        self.n += 1
        self.value += (value - self.value) * max(1 / self.n, gain)


@dataclass(slots=True)
class Outcomes:
    """Failures and successes of a node's requests, fading with time."""

    failures: Positive = 0.0
    successes: Positive = 0.0
    at_s: float | None = None  #: None: not touched since the start of this process, whose clock it is

    def add(self, failed: bool, now_s: float) -> None:
        """Count one request."""
        fade = OUTCOMES_KEPT * self._fade(now_s)
        self.failures = self.failures * fade + failed
        self.successes = self.successes * fade + (not failed)
        self.at_s = now_s

    def failure(self, now_s: float) -> float:
        """Probability that the next request fails, between 0 and 1, both excluded."""
        fade = self._fade(now_s)
        failures = self.failures * fade + PRIOR_FAILURE * PRIOR_OUTCOMES
        return failures / ((self.failures + self.successes) * fade + PRIOR_OUTCOMES)

    def _fade(self, now_s: float) -> float:
        return 1.0 if self.at_s is None else 0.5 ** (max(now_s - self.at_s, 0.0) / HALF_LIFE_S)


@dataclass(slots=True)
class ModelOnNode:
    """What was measured of one model on one node. Unmeasured rates have ``n`` 0."""

    prefill_tok_s: Rate = field(default_factory=Rate)
    decode_tok_s: Rate = field(default_factory=Rate)
    load_s: Rate = field(default_factory=Rate)


@dataclass(slots=True)
class OfNode:
    """What was measured of a node with all its models."""

    known: bool = False  #: whether the corrections relate to reported hardware or to the neutral guess
    prefill: Rate = field(default_factory=Rate)  #: measured ÷ promised
    decode: Rate = field(default_factory=Rate)
    load_bytes_s: Rate = field(default_factory=Rate)
    crowding: Mean = field(default_factory=lambda: Mean(NEIGHBOUR_SLOWDOWN, PRIOR_SLOWDOWNS))
    sharing: Mean = field(default_factory=lambda: Mean(RUNNER_SLOWDOWN, PRIOR_SLOWDOWNS))
    outcomes: Outcomes = field(default_factory=Outcomes)
    lost_s: Mean = field(default_factory=Mean)  #: time that a failed attempt took
    models: dict[str, ModelOnNode] = field(default_factory=dict)


@dataclass(slots=True)
class OfModel:
    """What was measured of a model wherever it ran."""

    prompt_ratio: Rate = field(default_factory=Rate)  #: true prompt tokens ÷ estimated ones
    sizes: dict[int, Rate] = field(default_factory=dict)  #: tokens that it could hold → bytes in memory


@dataclass(slots=True)
class State:
    """All that is kept. A change that an old reader would misread raises ``version``."""

    version: Literal[1] = 1
    nodes: dict[str, OfNode] = field(default_factory=dict)
    models: dict[str, OfModel] = field(default_factory=dict)
    lengths: dict[str, Histogram] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """For :meth:`from_json`. Safe beside a thread that learns: each table is copied in one step."""
        nodes = {name: _copied(node) for name, node in self.nodes.copy().items()}
        models = {
            key: OfModel(model.prompt_ratio, model.sizes.copy()) for key, model in self.models.copy().items()
        }
        lengths = {name: table.plain() for name, table in self.lengths.copy().items()}
        return _STATE.dump_json(State(nodes=nodes, models=models, lengths=lengths), indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """The inverse of :meth:`to_json`. Raises ValueError for anything else."""
        return _STATE.validate_json(text)

    @classmethod
    def load(cls, path: Path) -> State:
        """What ``path`` has. A missing file is an empty state; a broken one is set aside, and said so."""
        try:
            return cls.from_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            why = error.errors()[0]["msg"]
        except OSError as error:
            log.warning("Learned speeds cannot be read (%s); they are learned anew.", error)
            return cls()
        aside = path.with_name(path.name + ".broken")
        try:
            path.replace(aside)
        except OSError as error:
            log.warning("Learned speeds in %s are broken (%s), nor can they be moved: %s.", path, why, error)
        else:
            log.warning(
                "Learned speeds in %s are broken (%s): kept as %s, learned anew.", path, why, aside.name
            )
        return cls()

    def save(self, path: Path) -> None:
        """Write ``path`` atomically: whoever reads it sees the old state or the new one. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        with new.open("wb") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def _copied(node: OfNode) -> OfNode:
    # Without the time of the last outcome, which is a reading of this process' clock.
    return OfNode(
        node.known,
        node.prefill,
        node.decode,
        node.load_bytes_s,
        node.crowding,
        node.sharing,
        Outcomes(node.outcomes.failures, node.outcomes.successes),
        node.lost_s,
        node.models.copy(),
    )


_STATE = TypeAdapter(State)
