"""The fake node as a process of its own: ``python -m tests.fakes.ollama_node``."""

from __future__ import annotations

import argparse
import asyncio
import signal
from dataclasses import fields

from tests.fakes.machine import NodeSpec
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import FakeModel, embedding_model


def _model(text: str) -> FakeModel:
    """Return the model of ``name`` or ``name=bytes``; a name with ``embed`` in it only embeds."""
    name, _, size = text.partition("=")
    make = embedding_model if "embed" in name else FakeModel
    return make(name, size=int(size)) if size else make(name)


async def _run(options: argparse.Namespace) -> None:
    machine = {f.name: getattr(options, f.name) for f in fields(NodeSpec)}
    models = [_model(text) for text in options.models.split(",") if text]
    node = FakeOllama(models, keep_records=0 if options.no_record else 100_000, **machine)
    await node.start(options.port, options.host)
    print(node.host_port, flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await node.stop()


def main() -> None:
    """Serve until SIGINT or SIGTERM; the first line printed is ``host:port``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", default="llama3.2", help="NAME or NAME=BYTES, comma-separated")
    parser.add_argument("--no-record", action="store_true", help="keep no records of requests")
    parser.add_argument("--uvloop", action="store_true", help="serve on uvloop")
    for option in fields(NodeSpec):
        kind = float if isinstance(option.default, float) else int
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=option.default)
    options = parser.parse_args()
    if options.uvloop:
        import uvloop  # only where asked for: asyncio is what the tests run on

        uvloop.run(_run(options))
    else:
        asyncio.run(_run(options))
