"""A fake node, and if asked for its agent, as one process: ``python -m tests.soak.node --port 21000``.

Prints a line once it listens. ``GET /soak/state`` says what it is working on.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import orjson

from tests.fakes.exchange import Exchange
from tests.fakes.ollama_node import FakeOllama
from tests.fakes.store import GIB, FakeModel, embedding_model
from tests.soak.house import EMBED, FLEETING

STATE = "/soak/state"
KEPT_RECORDS = 1000
#: Room for all models of the house, at eight slots each, and Ollama's smallest default context.
VRAM_BYTES = 22 * GIB


def model(name: str) -> FakeModel:
    """A small model, quick to load and to pull."""
    return embedding_model(name) if name == EMBED else FakeModel(name, size=GIB // 4, block_count=7)


class SoakNode(FakeOllama):
    """Tells what it is working on."""

    async def _route(self, exchange: Exchange) -> None:
        if exchange.record.path != STATE:
            return await super()._route(exchange)
        state = {
            "generating": sum(runner.references for runner in self.scheduler.runners.values()),
            "queued": self.scheduler.queued,
            "requests": len(self.server.tasks) - 1,
        }
        await exchange.respond(200, orjson.dumps(state), "application/json")


async def _run(options: argparse.Namespace) -> None:
    node = SoakNode(
        [model(name) for name in options.models.split(",")],
        remote=[model(name) for name in FLEETING],
        keep_records=KEPT_RECORDS,
        vram_bytes=VRAM_BYTES,
        max_loaded_models=8,
        num_parallel=options.slots,
        time_scale=options.time_scale,
    )
    await node.start(options.port)
    if options.agent_port:
        from tests.fakes.fake_agent import FakeAgent  # a second of imports that the others come back without

        await FakeAgent(node).start(options.agent_port)
    print(node.host_port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Serve until killed, or until whoever started it is gone and its input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--agent-port", type=int, default=0, help="0: no agent")
    parser.add_argument("--models", required=True)
    parser.add_argument("--slots", type=int, default=1)
    # A token takes 4 ms, so that answers last long enough to be hit by a fault, and a load 5 ms.
    parser.add_argument("--time-scale", type=float, default=0.2)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
