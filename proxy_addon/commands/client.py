"""How the commands ask a running proxy, and how they end when they cannot."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import orjson
import typer
from rich.console import Console

TIMEOUT_S = 10.0
WIDE = 200  #: columns where nobody looks: a pipe has no width, and cut cells help no script

Url = Annotated[
    str,
    typer.Option("--url", envvar="SOLLOL_URL", metavar="URL", help="The proxy to ask; its --listen address."),
]
DEFAULT_URL = "http://127.0.0.1:11434"
AsJson = Annotated[bool, typer.Option("--json", help="Print the proxy's answer as it is.")]


class NoAnswer(Exception):
    """The proxy could not be asked, or had no answer; the message is one sentence."""


def fetch(url: str, path: str) -> Any:
    """The JSON that the proxy at ``url`` answers to ``path``.

    Raises:
        NoAnswer: nobody listens there, it is no SOLLOL proxy, or it answers with an error.
    """
    return asyncio.run(fetch_async(url, path))


async def fetch_async(url: str, path: str) -> Any:
    """As :func:`fetch`, in a running loop."""
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise NoAnswer(f"{url} is not the URL of a proxy")
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(base + path) as response:
            status, body = response.status, await response.read()
    except aiohttp.ClientConnectorError as exc:
        why = os.strerror(exc.os_error.errno) if exc.os_error.errno else str(exc.os_error)
        raise NoAnswer(
            f"no proxy answers at {base} ({why}): start one with `sollol proxy`, or name it with --url"
        ) from exc
    except (aiohttp.ClientError, TimeoutError) as exc:
        why = f"no answer within {TIMEOUT_S:g} s" if isinstance(exc, TimeoutError) else str(exc)
        raise NoAnswer(f"the proxy at {base} cannot be asked: {why}") from exc
    return _read(base, status, body)


def _read(base: str, status: int, body: bytes) -> Any:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NoAnswer(f"what listens at {base} is not a SOLLOL proxy (HTTP {status})") from None
    if status == 200:
        return answer
    error = answer.get("error") if isinstance(answer, dict) else None
    raise NoAnswer(f"the proxy at {base} says: {error or f'HTTP {status}'}")


def fail(command: str, sentence: object, status: int = 1) -> NoReturn:
    """End with one sentence on stderr."""
    typer.echo(f"sollol {command}: {sentence}", err=True)
    raise typer.Exit(status)


def console() -> Console:
    """Where tables go: as wide as the terminal, wide where there is none.

    Without markup: ``[fe80::2]:11434`` is a node.
    """
    return Console(width=None if sys.stdout.isatty() else WIDE, markup=False, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """Print ``value`` for a script."""
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def human_bytes(count: float | None) -> str:
    """``5.2 GiB``; a dash for what is not known."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_s(seconds: float | None) -> str:
    """``230 ms``, ``4.1 s``; a dash for what is not known."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"
