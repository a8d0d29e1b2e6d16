"""``sollol explain``: where a request went and why, from the proxy's journal."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxy_addon.commands.client import (
    DEFAULT_URL,
    AsJson,
    NoAnswer,
    Url,
    console,
    fail,
    fetch,
    human_s,
    print_json,
)
from proxy_addon.commands.sharded import plan_table


def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]", help="As in the answer's x-sollol-request-id; without it, the last request."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say where a request went and why."""
    try:
        made = _get(url, request_id)
    except NoAnswer as exc:
        fail("explain", exc)
    if as_json:
        print_json(made)
    else:
        show(made, console())


def _get(url: str, request_id: str | None) -> dict[str, Any]:
    if request_id is not None:
        found: dict[str, Any] = fetch(url, f"/sollol/explain/{quote(request_id, safe='')}")
        return found
    last: list[dict[str, Any]] = fetch(url, "/sollol/decisions?limit=1")["requests"]
    if not last:
        raise NoAnswer("the proxy has not placed any request yet")
    return last[0]


def show(made: dict[str, Any], to: Console) -> None:
    """Print one entry of the journal."""
    to.print(_summary(made))
    for number, decision in enumerate(made["decisions"], 1):
        to.print(_decision(number, decision))
    if made["attempts"]:
        to.print(_attempts(made["attempts"]))
    if made["stats"]:
        to.print(_stats(made["stats"]))
    if made.get("plan"):
        to.print(plan_table(made["plan"]))
    elif made.get("shard_plan"):
        to.print(
            Text.assemble(("\nplan ", "bold"), f"{made['shard_plan']}, which is no longer in the journal")
        )


def _summary(made: dict[str, Any]) -> Text:
    ok = made["outcome"] == "ok"
    parts = [f"{made['path']}", made.get("model"), f"from {made['client']}", f"at {made['at']}"]
    return Text.assemble(
        (f"request {made['id']}", "bold"),
        f": {' '.join(part for part in parts if part)}\n",
        (f"{made['outcome']}", "green" if ok else "red"),
        f" (HTTP {made['status'] or '-'}) on {made['node'] or 'no node'} after {human_s(made['duration_s'])}",
        f", first byte after {human_s(made['first_byte_s'])}" if made["first_byte_s"] is not None else "",
    )


def _decision(number: int, decision: dict[str, Any]) -> RenderableType:
    rows = decision["candidates"]
    terms = list(dict.fromkeys(name for row in rows for name in row.get("terms", ())))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("CANDIDATE", no_wrap=True)
    for title in ("COST", *terms):
        table.add_column(title.upper() if title == "COST" else title, justify="right")
    table.add_column("NOTES")
    for row in sorted(rows, key=lambda row: (row.get("cost") is None, row.get("cost") or 0.0)):
        table.add_row(*_candidate(row, terms), style="green" if row["node"] == decision["node"] else None)
    left_out = decision.get("candidates_left_out", 0)
    head = Text.assemble(("\ndecision ", "bold"), f"{number} by {decision['policy']}: {decision['reason']}")
    return Group(head, table, *([Text(f"and {left_out} more", "dim")] if left_out else []))


def _candidate(row: dict[str, Any], terms: list[str]) -> list[str]:
    if row.get("excluded"):
        return [row["node"], *["-"] * (len(terms) + 1), f"may not serve: {row['excluded']}"]
    cost = "-" if row["cost"] is None else f"{row['cost']:.3f}"
    values = [f"{row['terms'][name]:.3f}" if name in row["terms"] else "-" for name in terms]
    return [row["node"], cost, *values, ", ".join(row["notes"])]


def _attempts(attempts: list[dict[str, Any]]) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NODE", "FROM", "TO", "END", "DETAIL"):
        table.add_column(title, no_wrap=title == "NODE")
    for row in attempts:
        table.add_row(
            row["node"],
            human_s(row["started_s"]),
            human_s(row["ended_s"]),
            Text(row["outcome"] or "-", "green" if row["outcome"] == "ok" else "red"),
            row["detail"],
        )
    return Group(Text("\nattempts", "bold"), table)


def _stats(stats: dict[str, Any]) -> Text:
    said = [
        f"{name.removesuffix('_s').replace('_', ' ')} {human_s(value) if name.endswith('_s') else value}"
        for name, value in stats.items()
        if value is not None
    ]
    return Text.assemble(("\nas the node counted: ", "bold"), ", ".join(said) or "nothing")
