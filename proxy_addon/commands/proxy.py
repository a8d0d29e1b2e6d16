"""``sollol proxy``: read the settings, run the proxy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from proxy_addon.commands.client import fail


def proxy(
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where apps find the fleet.", show_default="127.0.0.1:11434"),
    ] = None,
    nodes: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT,…", help="Ollama servers, besides those found.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODE", help="Listen in another way too: regular@8080, socks5@1080, transparent@…"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings.",
            envvar="SOLLOL_CONFIG",
            show_default="./sollol.yaml if there is one",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting: timeouts.connect_s=5."),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where it remembers.", show_default="$XDG_STATE_HOME/sollol"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes that share the port, each on a core.", show_default="1"),
    ] = None,
) -> None:
    """Serve the whole fleet as one Ollama server."""
    # Imported here, for `sollol proxy --help` needs none of mitmproxy.
    from proxy_addon.settings import SettingsError, Source

    given: dict[str, str | list[str] | None] = {
        "--listen": listen,
        "--nodes": ",".join(nodes) if nodes else None,
        "--mode": mode,
        "--state-dir": str(state_dir) if state_dir else None,
        "--workers": str(workers) if workers is not None else None,
    }
    flags = {flag: value for flag, value in given.items() if value}
    source = Source(config, os.environ, sets or (), flags)
    try:
        settings = source.read()
    except SettingsError as mistake:
        fail("proxy", mistake, 2)
    from proxy_addon.start import run

    raise typer.Exit(run(settings, source))
