"""``sollol status``: the fleet as a table, live on a terminal."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
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
    fetch_async,
    human_bytes,
    human_s,
    print_json,
)
from proxy_addon.commands.sharded import load_lines

PATH = "/sollol/status"
COLOURS = {"up": "green", "returning": "yellow", "full": "yellow", "new": "dim", "leaving": "dim"}

TITLES = (
    *("NODE", "STATE", "IN FLIGHT", "IN MEMORY", "GPU FREE", "CPU"),
    *("SERVED", "FAILED", "LATENCY", "OLLAMA"),
)
RIGHT = ("SERVED", "FAILED", "LATENCY", "CPU")


def status(
    url: Url = DEFAULT_URL,
    once: Annotated[
        bool, typer.Option("--once", help="Print once; always so where there is no terminal.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show the nodes and what they are doing."""
    try:
        if as_json:
            print_json(fetch(url, PATH))
        elif once or not sys.stdout.isatty():
            console().print(render(fetch(url, PATH)))
        else:
            asyncio.run(_watch(url, interval))
    except NoAnswer as exc:
        fail("status", exc)


async def _watch(url: str, interval_s: float) -> None:
    """Show the table until interrupted. The first look must succeed, later ones may fail and come back."""
    shown: RenderableType = render(await fetch_async(url, PATH))
    with Live(shown, console=console(), auto_refresh=False, screen=False) as live:
        while True:
            live.update(shown, refresh=True)
            await asyncio.sleep(interval_s)
            try:
                shown = render(await fetch_async(url, PATH))
            except NoAnswer as exc:
                shown = Text(str(exc), "red")


def render(answer: dict[str, Any]) -> RenderableType:
    """The proxy's status as a table with a line above it."""
    nodes = answer["nodes"]
    up = sum(row["state"] in ("up", "returning", "full") for row in nodes)
    head = Text.assemble(
        (answer["status"], "green" if answer["status"] == "healthy" else "yellow" if up else "red"),
        f": {up} of {len(nodes)} nodes up, {answer['in_flight']} requests in flight,"
        f" {answer['queue_depth']} waiting, {answer['requests']} done, placed by {answer['policy']}",
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in TITLES:
        # What is too wide for a terminal wraps among the models, never in a node's name.
        table.add_column(
            title, justify="right" if title in RIGHT else "left", no_wrap=title in ("NODE", "STATE", *RIGHT)
        )
    for row in nodes:
        table.add_row(*_cells(row))
    remarks = [Text(f"{row['name']}: {each}", "yellow") for row in nodes for each in row["remarks"]]
    reasons = [Text(f"{row['name']}: {row['why']}", "dim") for row in nodes if row["why"]]
    pins = [Text(f"{row['why']}.", "yellow") for row in answer["pins"] if row["why"]]
    return Group(
        head,
        *_workers(answer),
        *_reload(answer),
        table,
        *remarks,
        *reasons,
        *pins,
        *_queue(answer),
        *load_lines(nodes),
    )


def _workers(answer: dict[str, Any]) -> list[Text]:
    """What each of several processes has in hand."""
    return [
        Text(
            f"worker {row['worker']}: process {row['pid']}, {row['in_flight']} in flight,"
            f" {row['queue_depth']} waiting, {row['requests']} done",
            "dim",
        )
        for row in answer.get("workers", ())
    ]


def _reload(answer: dict[str, Any]) -> list[Text]:
    """What became of the last change of the settings, if there was one."""
    last = answer.get("reload")
    style = "red" if last and last["result"] == "refused" else "dim"
    return [Text(f"{last['at']}: {last['said']}", style)] if last else []


def _queue(answer: dict[str, Any]) -> list[Text]:
    """Who waits, a line each, and how many more do."""
    lines = [
        Text(
            f"waiting {row['position']}: {row['model']} for {row['client']}, priority {row['priority']},"
            f" {human_s(row['waited_s'])} so far, {human_s(row['expected_wait_s'])} to go",
            "dim",
        )
        for row in answer["queue"]
    ]
    more = answer["queue_depth"] - len(lines)
    return [*lines, Text(f"and {more} more wait", "dim")] if more > 0 else lines


def _cells(row: dict[str, Any]) -> list[str | Text]:
    gpus, cpu = row["gpus"], row["cpu_utilisation"]
    free, total = (sum(gpu[f"memory_{which}_bytes"] for gpu in gpus) for which in ("free", "total"))
    return [
        row["name"],
        Text(row["state"], COLOURS.get(row["state"], "red")),
        f"{row['in_flight']}/{row['parallel']}",
        ", ".join(model["name"] for model in row["resident"]) or "-",
        f"{human_bytes(free)} of {human_bytes(total)}" if gpus else "-",
        "-" if cpu is None else f"{cpu:.0%}",
        str(row["served"]),
        str(row["failed"]),
        human_s(row["latency_s"]) if row["served"] else "-",
        row["version"] or "-",
    ]
