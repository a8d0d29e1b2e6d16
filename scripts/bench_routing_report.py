"""Tables of the routing benchmark, for the console and for ``docs/routing.md``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from bench_routing_results import Figures, Results
from bench_routing_subjects import BASE, ORACLE, OWN, ROOT, SUBJECTS, TWICE

DOC = ROOT / "docs" / "routing.md"
BEGIN, END = "<!-- routing: begin -->", "<!-- routing: end -->"
#: The aims: mean and p99 within this factor of the all-knowing balancer's, p99 this share of nginx
#: least_conn's, ten equal nodes this many times one.
WITHIN, SHARE, TENFOLD = 1.2, 0.25, 9.5
TWICE_WITHIN = 1.15  #: two proxies' p99 within this factor of one's
MANY, ONE = "equal10", "equal1"

NONE = "-"
#: Name in ``docs/img`` → what it shows, in the order of the document.
PICTURES = {
    "routing-ratios": "mean and p99 of each balancer on each trace, as multiples of the all-knowing one's",
    "routing-times": "for each trace the share of requests that take longer than a time",
}

#: What each trace is, for readers.
ABOUT = {
    "mixed": "three models, five kinds of client, bursts",
    "chats": "thirty conversations of ten turns, each with all that was said before",
    "swarm": "fifty agents that ask at once, amid other work",
    "embeddings": "batches of texts to embed beside chats",
    "swap": "five models, equally wanted, more than fit anywhere at once",
    "contexts": "one model at two context lengths, either of which reloads the other's",
    "slow_node": "the fastest node turns five times slower, and later recovers",
    "fail_fast": "a node answers every request with an error at once, and later recovers",
    "silent_cpu": "a node loses its GPU and goes on on the CPU without a word",
    "late_join": "the fastest node is down at first",
    MANY: "all of the work at once, on ten equal nodes",
    ONE: "the same work on one of them",
}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def seconds(value: float) -> str:
    """Three digits."""
    if math.isnan(value):
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float) -> str:
    """A ratio."""
    return NONE if math.isnan(value) else f"{value:.2f}×"


def over(own: float, other: float) -> float:
    """Their ratio; not a number where there is none."""
    return own / other if other > 0 else math.nan


def compared(results: Results, trace: str) -> Table:
    """All subjects on one trace."""
    head = (
        "", "ttft mean", "p50", "p99", "total mean", "p50", "p99", "tok/s", "loads", "retries", "failed",
        "mean ÷ all-knowing", "p99 ÷ all-knowing", "p99 ÷ nginx least_conn",
    )  # fmt: skip
    best, base = results.figures(trace, ORACLE), results.figures(trace, BASE)
    rows = []
    for subject in SUBJECTS.values():
        own = results.figures(trace, subject.name)
        if own is None:
            continue
        rows.append((
            subject.title,
            *(seconds(value) for part in (own.ttft, own.total) for value in (part.mean, part.p50, part.p99)),
            f"{own.tok_s:.0f}", f"{own.loads:.0f}", f"{own.retries:.0f}", failures(own),
            times(over(own.total.mean, best.total.mean) if best else math.nan),
            times(over(own.total.p99, best.total.p99) if best else math.nan),
            times(over(own.total.p99, base.total.p99) if base else math.nan),
        ))  # fmt: skip
    return head, rows


def failures(figures: Figures) -> str:
    """How many of how many; and what must never be."""
    spoilt = f", {figures.spoilt} spoilt" if figures.spoilt else ""
    return f"{figures.failed} of {figures.asked}{spoilt}"


def aims(results: Results) -> Table:
    """SOLLOL's default policy against the aims, trace by trace."""
    head = ("trace", "mean ÷ all-knowing", "p99 ÷ all-knowing", "p99 ÷ nginx least_conn",
            "loads: SOLLOL, nginx", "failed: SOLLOL, nginx", "aims met")  # fmt: skip
    rows = []
    for trace in results.names(lambda run: run.trace):
        found = [results.figures(trace, name) for name in (OWN, ORACLE, BASE)]
        if trace == MANY or not all(found):
            continue
        own, best, base = (figures for figures in found if figures)
        mean, tail = over(own.total.mean, best.total.mean), over(own.total.p99, best.total.p99)
        share = over(own.total.p99, base.total.p99)
        met = {"mean": mean <= WITHIN, "p99": tail <= WITHIN, "nginx": share <= SHARE}
        missed = [name for name, yes in met.items() if not yes]
        rows.append((
            f"`{trace}`", times(mean), times(tail), times(share), f"{own.loads:.0f}, {base.loads:.0f}",
            f"{own.failed + own.spoilt}, {base.failed + base.spoilt}",
            f"all but {', '.join(missed)}" if missed else "all",
        ))  # fmt: skip
    return head, rows


def first_minute(results: Results) -> Table:
    """Mean total time of what was sent in the first minute, when nothing had been learned."""
    traces = [trace for trace in results.names(lambda run: run.trace) if trace not in (MANY, ONE)]
    present = [subject for subject in SUBJECTS.values() if any(results.of(t, subject.name) for t in traces)]
    rows = []
    for subject in present:
        figures = [results.figures(trace, subject.name) for trace in traces]
        rows.append((
            subject.title,
            *(seconds(own.first_minute.mean) if own else NONE for own in figures),
        ))  # fmt: skip
    return ("", *(f"`{trace}`" for trace in traces)), rows


def tenfold(results: Results) -> Table:
    """How many times one node's throughput ten equal ones have."""
    one = results.figures(ONE, ORACLE)
    rows = []
    for subject in SUBJECTS.values():
        own = results.figures(MANY, subject.name)
        if own and one:
            rows.append((subject.title, f"{own.tok_s:.0f}", times(over(own.tok_s, one.tok_s)), failures(own)))
    return ("", "tok/s", "÷ one node", "failed"), rows


def twice(results: Results) -> Table:
    """Two proxies behind nginx beside one."""
    head = ("", "one: mean", "p99", "two: mean", "p99", "mean: two ÷ one", "p99: two ÷ one", "failed")
    rows = []
    for trace in results.names(lambda run: run.trace):
        one, two = results.figures(trace, OWN), results.figures(trace, TWICE)
        if one and two:
            ratios = (over(two.total.mean, one.total.mean), over(two.total.p99, one.total.p99))
            shown = (one.total.mean, one.total.p99, two.total.mean, two.total.p99)
            rows.append((f"`{trace}`", *map(seconds, shown), *map(times, ratios), failures(two)))
    return head, rows


def conditions(results: Results) -> str:
    """Under what all of it was measured."""
    about = results.about
    seeds = len({run.seed for run in results.runs})
    return (
        f"{seeds} seed{'s' if seeds > 1 else ''}, the clock {about['speed']:g} times faster, "
        f"{about['machine']}; "
        f"{', '.join(about['versions'])}; {about['date']}."
    )


def warnings(results: Results, busy: float, late_s: float) -> Iterator[str]:
    """Where the computer was too busy for a fair measurement."""
    for trace, subject in product(results.names(lambda run: run.trace), SUBJECTS.values()):
        figures = results.figures(trace, subject.name)
        if figures is None:
            continue
        for program, share in figures.cpu.items():
            if share > busy:
                yield f"{trace}, {subject.title}: {program} used {share:.0%} of a core"
        if figures.late_s > late_s:
            yield f"{trace}, {subject.title}: the computer was {figures.late_s:.1f} s late"


def console(table: Table) -> str:
    """A table in columns."""
    head, rows = table
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head, rows = table
    bar = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, bar, *rows))


def document(results: Results) -> str:
    """All of it, for the document."""
    parts = [conditions(results), *(f"![{text}](img/{name}.png)" for name, text in PICTURES.items())]
    parts += ["### SOLLOL's default policy against its aims", markdown(aims(results))]
    parts += ["### The first minute", "Mean seconds to the whole answer, of what was sent "
              "when nothing had been learned yet.", markdown(first_minute(results))]  # fmt: skip
    if results.figures(MANY, OWN) and results.figures(ONE, ORACLE):
        aim = f"How many times the throughput of one node. The aim is {TENFOLD:g}."
        parts += ["### Ten equal nodes", aim, markdown(tenfold(results))]
    if (found := twice(results))[1]:
        aim = (
            "Two proxies behind nginx ([sollol.conf](../deploy/nginx/sollol.conf)) that see each other "
            f"through the nodes' agents. The aim is a p99 within {TWICE_WITHIN:g} times that of one proxy."
        )
        parts += ["### Two proxies", aim, markdown(found)]
    parts += ["### Every trace", "Times in seconds; loads and retries are of one run."]
    for trace in results.names(lambda run: run.trace):
        parts += [f"#### `{trace}`: {ABOUT.get(trace, trace)}", markdown(compared(results, trace))]
    return "\n\n".join(parts)


def renew(results: Results) -> None:
    """Write the document's figures anew; what stands outside of the marks is left alone."""
    text = DOC.read_text("utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOC.name} lacks {BEGIN} or {END}")
    DOC.write_text(f"{head}{BEGIN}\n{document(results)}\n{END}{tail}", "utf-8")
