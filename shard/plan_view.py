"""A plan as people and programs read it: a picture of the layers, a table of the devices, totals, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from shard.plan import Host, Plan, Share, TooBig
from shard.shape import ModelShape

#: As ``free -h`` writes them, so that a table fits 80 columns.
_UNITS = ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki"))
#: Of the 16 colours that every terminal has, those that are told apart on black and on white.
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
#: Where there is no colour, neighbours differ by their fill; letters tell who is who.
_FILLS = "█▓▒░"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDEST = 100  #: of the picture, on a wide terminal


class Picture:
    """All layers in one bar, each device's in its colour and fill, its letter beneath."""

    def __init__(self, shares: Sequence[Share], layers: int) -> None:
        self.shares, self.layers = shares, layers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw as wide as there is room, at most ``_WIDEST`` columns."""
        places = self.layers + 1  # the output layer is one more
        width = max(min(options.max_width, _WIDEST), len(self.shares))
        bar, letters = [], []
        start = 0
        for index, share in enumerate(self.shares):
            # Each has one cell, however small it is, and its part of the others.
            placed = share.first_layer + share.layers + share.output
            end = index + 1 + round(placed * (width - len(self.shares)) / places)
            style, letter = Style(color=_colour(index)), _letter(index)
            fill = letter if options.ascii_only else _FILLS[index % len(_FILLS)]
            bar.append(Segment(fill * (end - start), style))
            letters.append(Segment(letter.center(end - start), style))
            start = end
        yield from (*bar, Segment.line(), *letters, Segment.line())


class Devices:
    """The table of a plan's devices; where it is narrow, without the parts of the memory."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = shares

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw with all columns, or with those that a narrow terminal has room for."""
        columns = [column for column in _COLUMNS if column.always or options.max_width >= _ALL_COLUMNS_WIDTH]
        table = _plain_table()
        table.add_column("")
        table.add_column("device", overflow="fold", min_width=8)
        for column in columns:
            table.add_column(column.name, justify="right", no_wrap=True)
        for index, share in enumerate(self.shares):
            name = escape(f"{share.device.host} {share.device.name}")
            cells = [column.cell(share) for column in columns]
            table.add_row(Text(_letter(index), _colour(index)), name, *cells)
        yield table


def render(
    plan: Plan, shape: ModelShape, hosts: Sequence[Host], left_out: Mapping[str, str]
) -> RenderableType:
    """Return ``plan`` for a console: picture, table, totals, and who is left out."""
    parts: list[RenderableType] = [Picture(plan.shares, len(shape.layers)), Text(), Devices(plan.shares)]
    totals = Text.assemble(
        (f"{1e3 / plan.ms_per_token:.1f} tokens/s", "bold"),
        f" expected, {plan.ms_per_token:.1f} ms each; prompts at {plan.prefill_tok_s:.0f} tokens/s; "
        f"loads in {_seconds(plan.load_s)}.",
    )
    parts += [Text(), totals, Text(f"{plan.coordinator} coordinates: {plan.reason}.")]
    if plan.parallel > 1:
        parts.append(Text(f"{plan.parallel} requests at once, each with a context of {plan.num_ctx}."))
    else:
        parts.append(Text(f"A context of {plan.num_ctx}, one request at a time."))
    return Group(*parts, *_notes(shape, _idle(plan, hosts), left_out))


def render_too_big(
    found: TooBig, shape: ModelShape, hosts: Sequence[Host], left_out: Mapping[str, str]
) -> RenderableType:
    """Return for a console by how much the model is too big, and what would fit."""
    headline = Text.assemble(
        ("Too big", "bold red"),
        f" by {_long_size(found.missing_bytes)}: it needs {_long_size(found.needed_bytes)} at a context of "
        f"{found.num_ctx}, and {_long_size(found.available_bytes)} can be lent.",
    )
    if found.largest_num_ctx:
        advice = Text(f"It would fit with a context of {found.largest_num_ctx}.")
    else:
        advice = Text("It would fit with no context, however small.")
    table = _plain_table()
    table.add_column("device", overflow="fold")
    table.add_column("free", justify="right")
    for host in hosts:
        for device in host.devices:
            table.add_row(escape(f"{host.name} {device.name}"), _size(device.free_bytes))
    rows: list[RenderableType] = [headline, advice]
    if table.row_count:
        rows += [Text(), table]
    return Group(*rows, *_notes(shape, (), left_out))


def as_json(
    planned: Plan | TooBig, shape: ModelShape, hosts: Sequence[Host], left_out: Mapping[str, str]
) -> str:
    """Return what the tables show, for programs: sizes in bytes, times in ms and s."""
    answer: dict[str, Any] = {"fits": isinstance(planned, Plan), **asdict(planned)}
    if isinstance(planned, Plan):
        answer["shares"] = [asdict(share) | {"memory_bytes": share.memory_bytes} for share in planned.shares]
    answer["model"] = {
        "architecture": shape.architecture,
        "layers": len(shape.layers),
        "weight_bytes": shape.weight_bytes,
        "upper_bound": shape.upper_bound,
    }
    answer["hosts"] = [asdict(host) for host in hosts]
    answer["left_out"] = dict(left_out)
    return json.dumps(answer, indent=2)


def _plain_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def _layers(share: Share) -> str:
    last = share.first_layer + share.layers - 1
    parts = []
    if share.layers:
        parts.append(f"{share.first_layer}-{last}" if share.layers > 1 else f"{last}")
    return " + ".join([*parts, *(["out"] if share.output else [])])


class _Column(NamedTuple):
    name: str
    cell: Callable[[Share], str]
    always: bool = True  #: also where it is narrow


_COLUMNS = (
    _Column("layers", _layers),
    _Column("weights", lambda share: _size(share.weight_bytes), always=False),
    _Column("KV", lambda share: _size(share.kv_bytes), always=False),
    _Column("buffers", lambda share: _size(share.buffer_bytes), always=False),
    _Column("total", lambda share: _size(share.memory_bytes)),
    _Column("of free", lambda share: f"{share.memory_bytes / share.device.free_bytes:.0%}"),
    _Column("ms/token", lambda share: f"{share.ms:.1f}"),
)
_ALL_COLUMNS_WIDTH = 76


def _idle(plan: Plan, hosts: Sequence[Host]) -> list[str]:
    return [host.name for host in hosts if host.name not in plan.nodes]


def _notes(shape: ModelShape, idle: Sequence[str], left_out: Mapping[str, str]) -> list[RenderableType]:
    notes: list[RenderableType] = []
    if shape.upper_bound:
        notes.append(Text(f"KV sizes are upper bounds: {shape.upper_bound}.", "yellow"))
    if idle:
        notes.append(Text(f"Not needed: {', '.join(idle)}."))
    if left_out:
        notes += [Text(), Text("Left out", "bold")]
        notes += [Padding(Text(f"{name}: {why}"), (0, 0, 0, 2)) for name, why in sorted(left_out.items())]
    return notes


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _letter(index: int) -> str:
    return _LETTERS[index % len(_LETTERS)]


def _long_size(size_bytes: float) -> str:
    text = _size(size_bytes)
    return f"{text[:-2]} {text[-2:]}B" if text.endswith("i") else text


def _size(size_bytes: float) -> str:
    """Three digits, in the unit in which there is something before the point."""
    for unit_bytes, unit in _UNITS:
        if size_bytes >= unit_bytes:
            value = size_bytes / unit_bytes
            return f"{value:.{0 if value >= 100 else 1}f}{unit}"
    return f"{size_bytes:.0f} B"


def _seconds(duration_s: float) -> str:
    minutes, seconds = divmod(round(duration_s), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{duration_s:.1f} s"
