"""``sollol agent``: runs the agent, or installs it as a service."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, NoReturn

import typer

DEFAULT_LISTEN = ["127.0.0.1:11435"]
DEFAULT_OLLAMA = "http://127.0.0.1:11434"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Report what this node has and does, for the proxies to place work by.",
)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    listen: Annotated[
        list[str], typer.Option(metavar="HOST:PORT", help="Where to serve the report; may be repeated.")
    ] = DEFAULT_LISTEN,
    ollama: Annotated[
        str, typer.Option(metavar="URL", envvar="SOLLOL_AGENT_OLLAMA", help="The Ollama beside this agent.")
    ] = DEFAULT_OLLAMA,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where the node's id is kept.", show_default="$XDG_STATE_HOME/sollol")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="SOLLOL_AGENT_TOKEN",
            help="What proxies on other machines must send to be believed what they have in flight.",
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="What serves the models: ollama or shard.")] = "ollama",
    mdns: Annotated[bool, typer.Option(help="Announce this node on the local network.")] = True,
    tunnel: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where members of this node's fleet reach its rpc-servers, once it has joined one.",
            show_default="the first --listen's host, port 11437",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            envvar="SOLLOL_AGENT_MEMORY",
            help="The most of each device that sharded models may use, such as 20GiB.",
            show_default="whatever is free",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="SOLLOL_AGENT_THREADS",
            help="Threads that compute a sharded model's layers on this node's CPU.",
            show_default="one for each core that may be used",
        ),
    ] = None,
) -> None:
    """Run the agent until it is interrupted."""
    if context.invoked_subcommand is not None:
        return
    # Imported here, for `sollol --help` and `sollol agent install` need none of it.
    from agent.run import CannotStart, Settings, parse_listen, parse_size
    from agent.run import run as serve

    if kind not in ("ollama", "shard"):
        _fail(f"--kind is ollama or shard, not {kind!r}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings(
            listen=[parse_listen(text) for text in listen],
            ollama_url=ollama,
            state_dir=state_dir,
            kind="shard" if kind == "shard" else "ollama",
            token=token or None,
            mdns=mdns,
            tunnel=None if tunnel is None else parse_listen(tunnel),
            lends_bytes=None if memory is None else parse_size(memory),
            threads=threads,
        )
        asyncio.run(serve(settings))
    except (ValueError, CannotStart) as error:
        _fail(str(error))


@app.command()
def install(
    with_proxy: Annotated[bool, typer.Option(help="Install the proxy's service too.")] = False,
    with_shard: Annotated[
        bool, typer.Option(help="Install the service of `sollol shard serve` too.")
    ] = False,
    prefix: Annotated[
        Path, typer.Option(help="Install below this directory, into an image of a system.")
    ] = Path("/"),
    executable: Annotated[
        Path | None, typer.Option(help="The sollol to run.", show_default="the one that runs now")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be done.")] = False,
) -> None:
    """Write the systemd unit of the agent, enable it and start it."""
    from agent.install import CannotInstall, UnitName, install_unit

    others: dict[UnitName, bool] = {"proxy": with_proxy, "shard": with_shard}
    names: list[UnitName] = ["agent", *(name for name, wanted in others.items() if wanted)]
    for name in names:
        try:
            steps = install_unit(name, prefix=prefix, executable=executable, dry_run=dry_run)
        except CannotInstall as error:
            _fail(str(error))
        for step in steps:
            typer.echo(step)


@app.command()
def join(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="The coordinator, as http://10.0.0.2:11436.")],
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="What `sollol shard init` printed there.")],
    name: Annotated[
        str | None, typer.Option(help="How the fleet calls this node.", show_default="its host name")
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the agent keeps its state.",
            show_default="for root that of the installed service, else $XDG_STATE_HOME/sollol",
        ),
    ] = None,
) -> None:
    """Make this node a member of a fleet, so that coordinators may lease its memory."""
    from agent.join import CannotJoin, join_and_say
    from agent.state import state_dir_for

    given = context.parent.params.get("state_dir") if context.parent else None
    directory = state_dir or given or state_dir_for("sollol-agent")
    try:
        for line in asyncio.run(join_and_say(url, token, directory, name)):
            typer.echo(line)
    except CannotJoin as error:
        _fail(str(error))
    typer.echo("An agent that runs here already accepts tunnels once it is restarted.")


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"sollol agent: {sentence}", err=True)
    raise typer.Exit(1)
