"""What the runs of the routing benchmark found, as a file and as figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from bench_routing_client import Outcome

FIRST_MINUTE_S = 60.0
SPOILT = ("lost", "doubled", "mixed")


@dataclass(frozen=True)
class Run:
    """A trace of one seed with one subject.

    ``cpu`` is each program's share of a core; ``late_s`` how late the computer at most was with anything, in
    seconds of the fleet's clock.
    """

    trace: str
    seed: int
    subject: str
    loads: int
    received: int  #: by the nodes, tries of the same request included
    cpu: dict[str, float]
    late_s: float
    outcomes: list[Outcome]

    @property
    def key(self) -> tuple[str, int, str]:
        """What it is the run of."""
        return self.trace, self.seed, self.subject


@dataclass
class Results:
    """All runs and what they were made under."""

    about: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write them; a run's outcomes as rows, times to the tenth of a millisecond."""
        runs = [{**vars(run), "outcomes": [_row(outcome) for outcome in run.outcomes]} for run in self.runs]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": self.about, "runs": runs}))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote."""
        kept = json.loads(path.read_text())
        runs = [
            Run(**{**run, "outcomes": [Outcome(*row) for row in run["outcomes"]]}) for run in kept["runs"]
        ]
        return cls(kept["about"], runs)

    def of(self, trace: str, subject: str) -> list[Run]:
        """The runs of a subject on a trace, one a seed."""
        return [run for run in self.runs if (run.trace, run.subject) == (trace, subject)]

    def figures(self, trace: str, subject: str) -> Figures | None:
        """The figures of a subject on a trace over all seeds, if it was run."""
        runs = self.of(trace, subject)
        return Figures.of(runs) if runs else None

    def names(self, what: Callable[[Run], str]) -> list[str]:
        """The traces or the subjects, in the order in which they were run."""
        return list(dict.fromkeys(map(what, self.runs)))


def _row(outcome: Outcome) -> list[Any]:
    return [round(value, 4) if isinstance(value, float) else value for value in asdict(outcome).values()]


@dataclass(frozen=True)
class Times:
    """Mean and quantiles of seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Times:
        """Of nothing they are not a number."""
        ordered = sorted(values)
        if not ordered:
            return cls(math.nan, math.nan, math.nan)
        return cls(fmean(ordered), quantile(ordered, 0.5), quantile(ordered, 0.99))


def quantile(ordered: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Figures:
    """What is compared. Times are of answered requests; those that failed are counted beside them."""

    asked: int
    failed: int
    spoilt: int
    ttft: Times
    total: Times
    first_minute: Times  #: total, of requests sent in it
    tok_s: float
    loads: float  #: a run
    retries: float  #: a run
    cpu: dict[str, float]  #: the most of any run
    late_s: float  #: likewise

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Figures:
        """Over runs of one trace and subject."""
        outcomes = [outcome for run in runs for outcome in run.outcomes]
        answered = [outcome for outcome in outcomes if outcome.verdict == "ok"]
        return cls(
            len(outcomes),
            sum(outcome.verdict == "failed" for outcome in outcomes),
            sum(outcome.verdict in SPOILT for outcome in outcomes),
            Times.of(outcome.ttft_s for outcome in answered),
            Times.of(outcome.total_s for outcome in answered),
            Times.of(outcome.total_s for outcome in answered if outcome.at_s < FIRST_MINUTE_S),
            sum(outcome.tokens for outcome in answered) / sum(map(duration_s, runs)),
            fmean(run.loads for run in runs),
            fmean(max(0, run.received - len(run.outcomes)) for run in runs),
            {name: max(run.cpu.get(name, 0.0) for run in runs) for name in runs[0].cpu},
            max(run.late_s for run in runs),
        )


def duration_s(run: Run) -> float:
    """From the first request to the last answer."""
    ended_s = max(outcome.at_s + outcome.total_s for outcome in run.outcomes)
    return ended_s - min(outcome.at_s for outcome in run.outcomes)
