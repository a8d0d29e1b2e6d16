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
from tests.fakes.process import _model
from tests.fakes.store import GIB, FakeModel
from tests.soak.house import FLEETING

STATE = "/soak/state"
KEPT_RECORDS = 1000


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
        [_model(text) for text in options.models.split(",")],
        remote=[FakeModel(name, size=GIB) for name in FLEETING],
        keep_records=KEPT_RECORDS,
        vram_bytes=64 * GIB,
        default_num_ctx=4096,
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
    # A token takes 4 ms, so that answers last long enough to be hit by a fault, and a pull of a GiB 20 ms.
    parser.add_argument("--time-scale", type=float, default=0.2)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
