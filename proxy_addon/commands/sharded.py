"""Sharded models in words: for ``sollol status`` how far a load is, for ``sollol explain`` who holds what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxy_addon.commands.client import human_bytes, human_s

BAR = 20  #: characters
COLOURS = {"ready": "green", "failed": "red"}


def load_lines(nodes: Iterable[dict[str, Any]]) -> list[Text]:
    """A line for each model that is loading or loaded on a coordinator of ``nodes``."""
    return [
        _load_line(node["name"], load)
        for node in nodes
        for load in (node.get("shard") or {}).get("loads", ())
    ]


def _load_line(coordinator: str, load: dict[str, Any]) -> Text:
    phase, progress = load["phase"], load["progress"]
    parts: list[str | tuple[str, str]] = [
        f"{coordinator}: {load['model']} ",
        (phase, COLOURS.get(phase, "yellow")),
    ]
    if phase not in ("ready", "failed"):
        full = round(progress * BAR)
        parts.append(f" [{'#' * full}{'.' * (BAR - full)}] {progress:.0%}")
        if load["eta_s"] is not None:
            parts.append(f", {human_s(load['eta_s'])} left")
    if load["plan"] is not None:
        parts.append(f"; {_layers(load['plan'])}")
    if load["error"]:
        parts.append(f"; {load['error']}")
    return Text.assemble(*parts)


def _layers(plan: dict[str, Any]) -> str:
    """``layers 0-17 on a CUDA0, 18-35 and output on b CPU``."""
    return "layers " + ", ".join(
        f"{_span(share)} on {share['node']} {share['device']}" for share in plan["shares"]
    )


def _span(share: dict[str, Any]) -> str:
    first, count = share["first_layer"], share["layers"]
    layers = "" if not count else str(first) if count == 1 else f"{first}-{first + count - 1}"
    return " and ".join(part for part in (layers, "output" if share["output"] else "") if part) or "none"


def plan_table(plan: dict[str, Any]) -> RenderableType:
    """The plan by which a request was served."""
    head = Text.assemble(
        ("\nplan ", "bold"),
        f"{plan['id']} of {plan['made_at']}: {plan['reason']};",
        f" num_ctx {plan['num_ctx']} × {plan['parallel']},",
        f" expected {plan['ms_per_token']:.1f} ms a token, load {human_s(plan['load_s'])}",
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NODE", "DEVICE", "LAYERS", "EXPECTED", "USED", "MS/TOKEN"):
        right = title in ("EXPECTED", "USED", "MS/TOKEN")
        table.add_column(title, no_wrap=title == "NODE", justify="right" if right else "left")
    for share in plan["shares"]:
        table.add_row(
            share["node"],
            share["device"],
            _span(share),
            human_bytes(share["memory_bytes"]),
            human_bytes(share["used_bytes"]),
            f"{share['ms_per_token']:.1f}",
        )
    return Group(head, table)
