"""The figures of a soak as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields

from tests.soak.measure import Measure
from tests.soak.outcome import End, Outcome
from tests.soak.shapes import SHAPES

PROTOCOL = {shape.name: shape.protocol for shape in SHAPES}
COLUMNS: tuple[End, ...] = ("ok", "cut", "left", "failed", "hang", "wrong", "broken", "silent")
MIB = 1 << 20


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie (nearest rank), 0 of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """``rows`` as Markdown, the first one as its head."""
    head, *rest = [[str(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest)]


def report(
    title: str,
    outcomes: Sequence[Outcome],
    faults: Mapping[str, int | str],
    before: Measure,
    after: Measure,
    covered: int,
    excused: int,
    violations: int,
) -> str:
    """All figures. ``before`` is the same process as ``after``, which was under fire between the two."""
    shapes: list[list[object]] = [["protocol", "requests", *COLUMNS, "p50", "p99"]]
    for protocol in ("native", "openai", "anthropic"):
        those = [o for o in outcomes if PROTOCOL[o.shape] == protocol]
        ends = Counter(o.end for o in those)
        # Of what nothing but nodes and proxy made longer.
        clean = [o for o in those if o.end == "ok" and o.manner == "stay" and not o.retries]
        took_s = [o.ended_s - o.sent_s for o in clean]
        times = [f"{quantile(took_s, share):.2f} s" for share in (0.5, 0.99)]
        shapes.append([protocol, len(those), *(ends[end] for end in COLUMNS), *times])
    retries = Counter(retry.why for o in outcomes for retry in o.retries)
    counted: list[list[object]] = [["what", "count"]]
    counted += [[kind, n] for kind, n in sorted(faults.items())]
    moved = sum(o.attempts > 1 for o in outcomes if o.end in ("ok", "left"))
    counted += [
        ["requests during which a node with their model was well all the time", covered],
        ["requests that were served by another node than the first", moved],
        ["client retries: port refused", retries["refused"]],
        ["client retries: kept connection closed", retries["stale"]],
        ["turned away by a proxy that was about to end", excused],
        ["violations", violations],
    ]
    base: list[list[object]] = [["at rest", "before", "after"]]
    base.append(["RSS", f"{before.rss_bytes / MIB:.0f} MiB", f"{after.rss_bytes / MIB:.0f} MiB"])
    for field in fields(Measure)[1:]:
        name = field.name
        base.append([name.replace("_", " "), getattr(before, name), getattr(after, name)])
    return "\n".join([title, "", *table(shapes), "", *table(counted), "", *table(base)])
