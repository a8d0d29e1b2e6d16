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
HALF_LIFE_S = 600.0  #: outcomes of requests are half forgotten after ten minutes
PRIOR_OUTCOMES = 10.0  #: a new node counts as one that failed in PRIOR_FAILURE of so many requests
PRIOR_FAILURE = 0.01

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-700, le=700)]  #: a logarithm whose exp is a float
Positive = Annotated[float, Field(allow_inf_nan=False, ge=0)]


@dataclass(slots=True)
class Rate:
    """A positive quantity as the mean of its logarithm, with forgetting."""

    log: Finite = 0.0
    n: NonNegativeInt = 0

    @property
    def value(self) -> float:
        """The mean; 1 before the first measurement."""
        return math.exp(self.log)

    @property
    def measured(self) -> float | None:
        """The mean; None before the first measurement."""
        return math.exp(self.log) if self.n else None

    def add(self, value: float) -> None:
        """Take in one measurement, which must be positive."""
        self._add(value, max(1 / (self.n + 1), GAIN))

    def add_bounded(self, value: float, gain_up: float) -> None:
        """Take in one measurement that is true or too high: a higher one than the mean counts ``gain_up``."""
        if self.n and math.log(value) > self.log:
            self._add(value, gain_up)
        else:
            self.add(value)

    def _add(self, value: float, gain: float) -> None:
        self.n += 1
        self.log += (math.log(value) - self.log) * gain


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
        fade = self._fade(now_s)
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
        return _STATE.dump_json(State(nodes=nodes, models=models, lengths=self.lengths.copy()), indent=1)

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
        Outcomes(node.outcomes.failures, node.outcomes.successes),
        node.lost_s,
        node.models.copy(),
    )


_STATE = TypeAdapter(State)
