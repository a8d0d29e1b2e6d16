"""``sollol explain``: where a request went and why, from the proxy's journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console, Group, RenderableType
from rich.errors import ConsoleError
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

#: What building a table of an entry can meet that has another shape than this version's.
MISSHAPEN = (LookupError, TypeError, ValueError, AttributeError, ConsoleError)


def explain(
    entry_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]", help="As in the answer's x-sollol-request-id; without it, the last request."
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="List what the proxy did by itself: replica or probe."),
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Say where a request went and why."""
    if kind is not None and entry_id is not None:
        fail("explain", "an ID says what is meant: leave out --kind", 2)
    try:
        made: Any = _notes(url, kind) if kind is not None else _get(url, entry_id)
        if as_json:
            print_json(made)
        elif kind is not None:
            console().print(_shaped(notes_table, made))
        else:
            show(made, console())
    except NoAnswer as exc:
        fail("explain", exc)


def _get(url: str, entry_id: str | None) -> dict[str, Any]:
    if entry_id is not None:
        found: dict[str, Any] = fetch(url, f"/sollol/explain/{quote(entry_id, safe='')}")
        return found
    last = _listed(url, "/sollol/decisions?limit=1", "requests")
    if not last:
        raise NoAnswer("the proxy has not placed any request yet")
    return last[0]


def _listed(url: str, path: str, name: str) -> list[dict[str, Any]]:
    answer = fetch(url, path)
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise NoAnswer(f"the proxy at {url} is of another version: it tells of no {name}")
    return found


def _notes(url: str, kind: str) -> list[dict[str, Any]]:
    found = _listed(url, f"/sollol/decisions?kind={quote(kind, safe='')}", "notes")
    if not found:
        raise NoAnswer(f"the proxy has noted no {kind!r} yet")
    return found


def _shaped[Made](render: Callable[[Made], RenderableType], made: Made) -> RenderableType:
    """``made`` as ``render`` shows it. Raises NoAnswer where it has not the shape that this version knows."""
    try:
        return render(made)
    except MISSHAPEN:
        raise NoAnswer(
            "this entry cannot be shown, for another version of SOLLOL has written it or it is damaged;"
            " --json prints it as it is"
        ) from None


def show(made: dict[str, Any], to: Console) -> None:
    """Print one entry of the journal. Raises NoAnswer for one of another shape."""
    to.print(_shaped(lambda made: _note(made) if "note" in made else _request(made), made))


def _request(made: dict[str, Any]) -> Group:
    parts: list[RenderableType] = [_summary(made)]
    parts += [_decision(number, decision) for number, decision in enumerate(made["decisions"], 1)]
    if made["attempts"]:
        parts.append(_attempts(made["attempts"]))
    if made["stats"]:
        parts.append(_stats(made["stats"]))
    if made.get("plan"):
        parts.append(plan_table(made["plan"]))
    elif made.get("shard_plan"):
        gone = f"{made['shard_plan']}, which is no longer in the journal"
        parts.append(Text.assemble(("\nplan ", "bold"), gone))
    return Group(*parts)


def _note(made: dict[str, Any]) -> Text:
    return Text.assemble(
        (f"{made['note']} {made['id']}", "bold"), f" at {made['at']}\n", _said(made["data"], "\n")
    )


def notes_table(notes: list[dict[str, Any]]) -> Table:
    """What the proxy did by itself, the newest first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("AT", "ID", "WHAT"):
        table.add_column(title, no_wrap=title != "WHAT")
    for note in notes:
        table.add_row(f"{note['at']}", f"{note['id']}", _said(note["data"], ", "))
    return table


def _said(data: dict[str, Any], between: str) -> str:
    """The fields of a note that have a value, as they are named."""
    return between.join(
        f"{name.removesuffix('_s').replace('_', ' ')} {human_s(value) if name.endswith('_s') else value}"
        for name, value in data.items()
        if value is not None
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
        _asked(made),
    )


def _asked(made: dict[str, Any]) -> str:
    """What was asked for and how long it waited for its turn; entries of earlier versions do not say."""
    if "kind" not in made:
        return ""
    wants = ", with a GPU" if made["requires_gpu"] else ""
    said = f"\nasked for {made['kind']} ({made['complexity']}{wants}), priority {made['priority']}"
    if (position := made.get("queue_position")) is None:
        return said
    waited_s, expected_s = human_s(made["queued_s"]), human_s(made["expected_wait_s"])
    return f"{said}, waited {waited_s} in line at place {position}, {expected_s} expected"


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
    return Text.assemble(("\nas the node counted: ", "bold"), _said(stats, ", ") or "nothing")
