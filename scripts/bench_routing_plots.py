"""Pictures of the routing benchmark for ``docs/img``: the same results give the same files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
from bench_routing_report import MANY, ONE, WITHIN
from bench_routing_results import Results, quantile
from bench_routing_subjects import BASE, ORACLE, OWN, ROOT, SUBJECTS

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

IMAGES = ROOT / "docs" / "img"
#: Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers for those who print.
STYLES = {
    ORACLE: ("#000000", "--", "D"),
    OWN: ("#0072B2", "-", "o"),
    "sollol-score": ("#56B4E9", "-.", "s"),
    "sollol-least-loaded": ("#009E73", "-.", "^"),
    "sollol-round-robin": ("#8C8C8C", "-.", "v"),
    BASE: ("#D55E00", "-", "X"),
    "nginx-round-robin": ("#C9A400", ":", "v"),
    "haproxy": ("#CC79A7", "-", "P"),
    "envoy": ("#E69F00", "-", "h"),
}
POINTS = 160  #: of a curve: finer cannot be seen
COLUMNS = 3
DPI = 140
LOOK = {
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


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture and forget it."""
    figure.savefig(IMAGES / f"{name}.png", dpi=DPI, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def curves(results: Results, traces: Sequence[str]) -> None:
    """For each trace the share of requests answered within a time."""
    rows = math.ceil(len(traces) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(3.3 * COLUMNS, 2.5 * rows + 0.9), squeeze=False, sharey=True
    )
    for axis, trace in zip(axes.flat, traces, strict=False):
        _curves(axis, results, trace)
    for axis in axes.flat[len(traces) :]:
        axis.set_visible(False)
    for column in range(COLUMNS):
        lowest = [axis for axis in axes[:, column] if axis.get_visible()]
        if lowest:
            lowest[-1].set_xlabel("seconds to the whole answer")
    for row in axes:
        row[0].set_ylabel("share of requests")
    _legend(figure, axes.flat[0])
    figure.tight_layout(rect=(0, 0.9 / (2.5 * rows + 0.9), 1, 1))
    save(figure, "routing-times")


def _curves(axis: Axes, results: Results, trace: str) -> None:
    for name in reversed(SUBJECTS):  # ours and the best last, above the others
        runs = results.of(trace, name)
        if not runs:
            continue
        outcomes = [outcome for run in runs for outcome in run.outcomes]
        answered = sorted(outcome.total_s for outcome in outcomes if outcome.verdict == "ok")
        shares = [point / POINTS for point in range(1, POINTS + 1)]
        colour, dashes, _ = STYLES[name]
        axis.plot(
            [quantile(answered, share) for share in shares],
            # A curve of one that failed some does not reach the top.
            [share * len(answered) / len(outcomes) for share in shares],
            color=colour,
            linestyle=dashes,
            linewidth=2.2 if name == OWN else 1.3,
            label=SUBJECTS[name].title,
        )
    axis.set_xscale("log")
    axis.set_ylim(0, 1.02)
    axis.set_title(trace, loc="left", fontweight="bold", fontsize=9)


def tails(results: Results, traces: Sequence[str]) -> None:
    """Mean and p99 of every subject on every trace, as multiples of the all-knowing balancer's."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.42 * len(traces) + 2.0), sharey=True)
    for axis, what in zip(axes, ("mean", "p99"), strict=True):
        for name in reversed(SUBJECTS):
            if name == ORACLE:
                continue
            ratios = [_ratio(results, trace, name, what) for trace in traces]
            colour, _, marker = STYLES[name]
            axis.scatter(
                ratios,
                range(len(traces)),
                color=colour,
                marker=marker,
                s=70 if name == OWN else 38,
                edgecolors="white",
                linewidths=0.6,
                zorder=4 if name == OWN else 3,
                label=SUBJECTS[name].title,
            )
        axis.axvline(1, color="black", linestyle="--", linewidth=1, label="all-knowing")
        axis.axvspan(axis.get_xlim()[0], WITHIN, color="#0072B2", alpha=0.08, linewidth=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.set_title(f"{what} of seconds to the whole answer", loc="left", fontweight="bold", fontsize=9)
        axis.set_xlabel("times the all-knowing balancer's (log; the aim is shaded)")
    axes[0].set_yticks(range(len(traces)), traces)
    axes[0].invert_yaxis()
    _legend(figure, axes[0])
    height = 0.42 * len(traces) + 2.0
    figure.tight_layout(rect=(0, 0.75 / height, 1, 1))
    save(figure, "routing-ratios")


def _ratio(results: Results, trace: str, name: str, what: str) -> float:
    own, best = results.figures(trace, name), results.figures(trace, ORACLE)
    if own is None or best is None:
        return math.nan
    return float(getattr(own.total, what) / getattr(best.total, what))


def _legend(figure: plt.Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    order = [subject.title for subject in SUBJECTS.values() if subject.title in shown]
    figure.legend([shown[title] for title in order], order, loc="lower center", ncols=5)
