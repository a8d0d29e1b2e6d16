"""Pictures of the routing benchmark for ``docs/img``: the same results give the same files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from bench_routing_report import MANY, ONE, WITHIN
from bench_routing_results import Results, quantile
from bench_routing_subjects import BASE, ORACLE, OWN, ROOT, SUBJECTS, TWICE

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = ROOT / "docs" / "img"
#: Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers for those who print.
STYLES = {
    ORACLE: ("#000000", "--", "D"),
    OWN: ("#0072B2", "-", "o"),
    TWICE: ("#3D3D9E", "--", "d"),
    "sollol-score": ("#56B4E9", "-.", "s"),
    "sollol-least-loaded": ("#009E73", "-.", "^"),
    "sollol-round-robin": ("#8C8C8C", "-.", "v"),
    BASE: ("#D55E00", "-", "X"),
    "nginx-round-robin": ("#7A4A1E", ":", "v"),
    "haproxy": ("#CC79A7", "-", "P"),
    "envoy": ("#E69F00", "-", "h"),
}
POINTS = 160  #: of a curve: finer cannot be seen
LEAST_SHARE = 0.003  #: of requests that a curve goes down to: a few of all seeds'
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LEGEND_INCHES = 0.55
FOREVER_S = 1e9
COLUMNS = 3
DPI = 140
LOOK: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def traces_of(results: Results) -> list[str]:
    """Those in which balancers differ by whom they choose."""
    return [name for name in results.names(lambda run: run.trace) if name not in (MANY, ONE)]


def draw(results: Results) -> None:
    """Make all pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        curves(results, traces_of(results))
        tails(results, traces_of(results))


def curves(results: Results, traces: Sequence[str]) -> None:
    """For each trace the share of requests that take longer than a time."""
    rows = math.ceil(len(traces) / COLUMNS)
    height = 2.6 * rows + LEGEND_INCHES
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3.4 * COLUMNS, height), squeeze=False, sharey=True)
    for axis, trace in zip(axes.flat, traces, strict=False):
        _curves(axis, results, trace)
    for axis in axes.flat[len(traces) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(traces) - COLUMNS) : len(traces)]:
        axis.set_xlabel("seconds to the whole answer")
    for row in axes:
        row[0].set_ylabel("share that takes longer")
    _finish(figure, axes.flat[0], height, "routing-times")


def _curves(axis: Axes, results: Results, trace: str) -> None:
    shares = [LEAST_SHARE ** (point / POINTS) for point in range(POINTS + 1)]
    longest_s = 0.0
    for name in reversed(SUBJECTS):  # ours and the best last, above the others
        outcomes = [outcome for run in results.of(trace, name) for outcome in run.outcomes]
        if not outcomes:
            continue
        # Who got no answer waits for ever: the curve runs level out of the picture.
        waited = sorted(outcome.total_s if outcome.verdict == "ok" else FOREVER_S for outcome in outcomes)
        longest_s = max(longest_s, *(seconds for seconds in waited if seconds < FOREVER_S))
        colour, dashes, _ = STYLES[name]
        axis.plot(
            [quantile(waited, 1 - share) for share in shares],
            shares,
            color=colour,
            linestyle=dashes,
            linewidth=2.2 if name == OWN else 1.6 if name == ORACLE else 1.1,
            label=SUBJECTS[name].title,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.1, max(1.0, 1.2 * longest_s))
    axis.set_ylim(LEAST_SHARE, 1.05)
    axis.set_yticks((1, 0.1, 0.01), ("100 %", "10 %", "1 %"))
    _plain(axis, every=3)
    axis.set_title(trace, loc="left", fontweight="bold", fontsize=9)


def _plain(axis: Axes, every: int = 1) -> None:
    """Numbers as people write them on a logarithmic axis."""
    low, high = axis.get_xlim()
    ticks = [tick for tick in TICKS[::every] if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def tails(results: Results, traces: Sequence[str]) -> None:
    """Mean and p99 of every subject on every trace, as multiples of the all-knowing balancer's."""
    height = 0.42 * len(traces) + 1.0 + LEGEND_INCHES
    figure, axes = plt.subplots(1, 2, figsize=(3.4 * COLUMNS, height), sharey=True)
    for axis, what in zip(axes, ("mean", "p99"), strict=True):
        for name in reversed(SUBJECTS):
            if name == ORACLE:
                continue
            colour, _, marker = STYLES[name]
            axis.scatter(
                [_ratio(results, trace, name, what) for trace in traces],
                range(len(traces)),
                color=colour,
                marker=marker,
                s=70 if name == OWN else 38,
                edgecolors="white",
                linewidths=0.6,
                zorder=4 if name == OWN else 3,
                label=SUBJECTS[name].title,
            )
        axis.axvline(1, color="black", linestyle="--", linewidth=1, label=SUBJECTS[ORACLE].title)
        axis.set_xscale("log")
        axis.set_xlim(*_round_about(axis.get_xlim()))
        axis.axvspan(axis.get_xlim()[0], WITHIN, color=STYLES[OWN][0], alpha=0.08, linewidth=0)
        _plain(axis)
        axis.set_title(f"{what} of seconds to the whole answer", loc="left", fontweight="bold", fontsize=9)
        axis.set_xlabel("times that of the all-knowing balancer (the aim is shaded)")
    axes[0].set_yticks(range(len(traces)), traces)
    axes[0].invert_yaxis()
    _finish(figure, axes[0], height, "routing-ratios")


def _round_about(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits that are ticks or near one: an axis without numbers at its ends says little."""
    low = max((tick for tick in TICKS if tick <= limits[0]), default=limits[0])
    high = min((tick for tick in TICKS if tick >= limits[1]), default=limits[1])
    return max(low, 0.5), high


def _ratio(results: Results, trace: str, name: str, what: str) -> float:
    own, best = results.figures(trace, name), results.figures(trace, ORACLE)
    if own is None or best is None:
        return math.nan
    return float(getattr(own.total, what) / getattr(best.total, what))


def _finish(figure: Figure, axis: Axes, height: float, name: str) -> None:
    """Set one legend for all below, and write the picture."""
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    order = [subject.title for subject in SUBJECTS.values() if subject.title in shown]
    figure.tight_layout(rect=(0, LEGEND_INCHES / height, 1, 1))
    figure.legend([shown[title] for title in order], order, loc="lower center", ncols=5)
    figure.savefig(IMAGES / f"{name}.png", dpi=DPI, facecolor="white")
    plt.close(figure)
