"""``sollol models``: every model of the fleet and the nodes that have it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.table import Table

from proxy_addon.commands.client import (
    DEFAULT_URL,
    AsJson,
    NoAnswer,
    Url,
    console,
    fail,
    fetch,
    human_bytes,
    print_json,
)


def models(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the models and the nodes that have them."""
    try:
        nodes = fetch(url, "/sollol/nodes")["nodes"]
    except NoAnswer as exc:
        fail("models", exc)
    rows = by_model(nodes)
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("MODEL", "VERSION", "SIZE", "IN MEMORY ON", "STORED ON"):
        table.add_column(title, no_wrap=title == "MODEL")
    for row in rows:
        in_memory = ", ".join(row["in_memory"]) or "-"
        table.add_row(
            row["name"], row["digest"][:12], human_bytes(row["size"]), in_memory, ", ".join(row["stored"])
        )
    console().print(table)


def by_model(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each name and digest, by name: where it is stored, and where it is in memory."""
    rows: defaultdict[tuple[str, str], dict[str, Any]] = defaultdict(lambda: {"in_memory": [], "stored": []})
    for node in nodes:
        resident = {model["name"] for model in node["resident"]}
        for model in node["models"]:
            row = rows[model["name"], model["digest"]]
            row |= {"name": model["name"], "digest": model["digest"], "size": model["size"]}
            row["stored"].append(node["name"])
            if model["name"] in resident:
                row["in_memory"].append(node["name"])
    return [rows[key] for key in sorted(rows)]
