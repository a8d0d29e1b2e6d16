"""Tables of the proxy benchmark, for the console and for ``docs/performance.md``."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench_proxy_results import Figures, Many, Results
from bench_proxy_subjects import DIRECT, ENVOY, LITELLM, OWN
from bench_routing_report import NONE, Table, console, markdown, over
from bench_routing_subjects import ROOT

DOC = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench-proxy: begin -->", "<!-- bench-proxy: end -->"
CONCURRENCIES = (1, 16, 128)
BUSY = 16  #: there a process is rarely put to sleep and woken, which costs nginx four times its own work
#: The aims of the data plane; times in the same run.
ADDED_MS, LITELLM_SHARE = 1.0, 1 / 8
ENVOY_TIMES, ENVOY_AIM = 2.0, 1.3
REQUEST_US = 450.0
MANY_MB = 120.0


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits, but no less than whole; a dash where there is none."""
    if math.isnan(value):
        return NONE
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole) if whole else 2}f}"


def times(value: float) -> str:
    """A ratio."""
    return NONE if math.isnan(value) else f"{value:.2f}×"


def latency(results: Results) -> Table:
    """What each adds to a direct connection, and how many requests a second it passes on one core."""
    head = (
        "added ms",
        *(f"{text}{c}" for c in CONCURRENCIES for text in ("p50 at ", "p99 at ")),
        *(f"requests/s at {c}" for c in CONCURRENCIES[1:]),
    )
    rows = []
    for one in _measured(results):
        cells = []
        for c in CONCURRENCIES:
            for value in (lambda s: s.p50_ms, lambda s: s.p99_ms):
                its_own = one.name == DIRECT
                cells.append(one.median(c, value) if its_own else results.added_ms(one, DIRECT, c, value))
        cells += [one.median(c, lambda s: s.per_s) for c in CONCURRENCIES[1:]]
        rows.append((f"{one.title}{' (whole)' if one.name == DIRECT else ''}", *map(number, cells)))
    return head, rows


def cost(results: Results) -> Table:
    """Processor time and memory."""
    head = (
        "", *(f"CPU µs a request at {c}" for c in CONCURRENCIES), "CPU ms a stream of 100", "÷ Envoy",
        "idle % of a core", "MB idle", "MB with 1,000 streams", "MB more",
    )  # fmt: skip
    envoy = _stream_ms(results, ENVOY)
    rows = []
    for one in _measured(results):
        if one.name == DIRECT:
            continue
        base, most = (one.many.base_mb, one.many.most_mb) if one.many else (math.nan, math.nan)
        rows.append((
            one.title,
            *(number(one.median(c, lambda s: s.cpu_us)) for c in CONCURRENCIES),
            number(one.stream_ms()), times(over(one.stream_ms(), envoy)), number(one.idle_share * 100),
            *map(number, (base, most, most - base)),
        ))  # fmt: skip
    return head, rows


def many(results: Results) -> Table:
    """A thousand streams: who keeps up."""
    head = (
        "", "open at once", "chunks that came", "later than 250 ms, or never", "latest, ms",
        "longest way, ms", "node's own lateness, ms", "% of a core",
    )  # fmt: skip
    rows = []
    for one in _measured(results):
        if found := one.many:
            rows.append((
                one.title, f"{found.open_most:,}", f"{found.came:,} of {found.asked:,}",
                f"{found.late / found.asked:.2%}", _at_least(found), number(found.way_max_ms),
                number(found.node_max_ms), number(found.cpu_share * 100),
            ))  # fmt: skip
    return head, rows


def _at_least(found: Many) -> str:
    """The latest chunk; one that never came would have been later."""
    return f"{'' if found.came == found.asked else '>'}{number(found.late_max_ms)}"


def targets(results: Results) -> Table:
    """Each aim, the figure, and whether it is met."""
    head = ("aim", "figure", "met")
    own = results.of(OWN)
    if own is None:
        return head, []
    added, other = (_added(results, name) for name in (OWN, LITELLM))
    envoy = over(own.stream_ms(), _stream_ms(results, ENVOY))
    busy_us, lone_us = (own.median(many, lambda s: s.cpu_us) for many in (BUSY, 1))
    request = f"CPU of a small request ≤{REQUEST_US:.0f} µs"
    asked = (
        (f"added p50 ≤{ADDED_MS:.1f} ms", f"{number(added)} ms", added, ADDED_MS),
        ("added p50 ≤1/8 of LiteLLM's", times(over(added, other)), over(added, other), LITELLM_SHARE),
        (f"CPU of a stream of 100 chunks ≤{ENVOY_TIMES:g}× Envoy's", times(envoy), envoy, ENVOY_TIMES),
        (f"the same, ≤{ENVOY_AIM:g}×", times(envoy), envoy, ENVOY_AIM),
        (f"{request}, on {BUSY} connections", f"{number(busy_us)} µs", busy_us, REQUEST_US),
        ("the same, on one", f"{number(lone_us)} µs", lone_us, REQUEST_US),
        *_many_targets(own),
    )
    return head, [(aim, figure, _met(value, limit)) for aim, figure, value, limit in asked]


def _many_targets(own: Figures) -> Iterator[tuple[str, str, float, float]]:
    found = own.many
    if found is None:
        return
    what = f"{found.streams:,} streams of 20 chunks/s on one core"
    late = f"{found.late} of {found.asked:,}, latest {_at_least(found)} ms"
    yield f"{what}: no chunk later than 250 ms", late, float(found.late), 0.0
    most_mb = found.most_mb if found.open_most == found.streams else math.nan
    yield (
        f"{what}: ≤{MANY_MB:.0f} MB",
        f"{number(found.most_mb)} MB, {found.open_most:,} open",
        most_mb,
        MANY_MB,
    )


def _met(value: float, limit: float) -> str:
    return "not measured" if math.isnan(value) else "yes" if value <= limit else "no"


def _added(results: Results, name: str) -> float:
    one = results.of(name)
    return results.added_ms(one, DIRECT, 1, lambda s: s.p50_ms) if one else math.nan


def _stream_ms(results: Results, name: str) -> float:
    one = results.of(name)
    return one.stream_ms() if one else math.nan


def _measured(results: Results) -> Iterator[Figures]:
    return (one for one in results.figures if one.small)


def notes(results: Results) -> Iterator[str]:
    """Who is missing, and what clients saw that they should not have."""
    for one in results.figures:
        if one.note:
            yield f"{one.title}: {one.note}"
        if wrongs := one.wrongs():
            yield f"{one.title}: {', '.join(f'{what} {count:,} times' for what, count in wrongs.items())}"


def conditions(results: Results) -> str:
    """Under what all of it was measured."""
    about = results.about
    versions = [f"{one.title} {one.version}" for one in results.figures if one.version]
    quick = ", a quick run" if about["quick"] else ""
    return (
        f"{about['date']}{quick}; {about['machine']}; `sum(range(1000))` took {about['yardstick_us']:.1f} µs "
        f"(about 10 on an idle desktop), and other programs used {about['foreign_share']:.0%} of the cores "
        f"meanwhile; medians of {about['rounds']} round{'s' * (about['rounds'] > 1)}. "
        f"{about['python']}; {', '.join(versions)}."
    )


TABLES = (
    ("The aims", targets),
    ("Added latency, and requests a second", latency),
    ("Processor time and memory", cost),
    ("A thousand streams", many),
)


def text(results: Results) -> str:
    """All of it for the console."""
    parts = [conditions(results), *(f"{title}\n{console(table(results))}" for title, table in TABLES)]
    return "\n\n".join([*parts, *notes(results)])


def document(results: Results) -> str:
    """All of it for the document."""
    parts = [conditions(results)]
    for title, table in TABLES:
        parts += [f"### {title}", markdown(table(results))]
    if said := list(notes(results)):
        parts += ["### What went wrong", "\n".join(f"- {note}" for note in said)]
    return "\n\n".join(parts)


def renew(results: Results) -> None:
    """Write the document's figures anew; what stands outside of the marks is left alone."""
    DOC.write_text(renewed(DOC.read_text("utf-8"), results), "utf-8")


def renewed(page: str, results: Results) -> str:
    """``page`` with what is between the marks made anew."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOC.name} lacks {BEGIN} or {END}")
    return f"{head}{BEGIN}\n{document(results)}\n{END}{tail}"
