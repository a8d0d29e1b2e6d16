"""Run several programs as one: the last one once the others take connections; all end with the first.

    python scripts/bench_routing_together.py FILE

FILE is JSON: a list of ``{"command": […], "port": 1234}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


async def main(programs: Sequence[dict[str, Any]]) -> int:
    """Return the exit status of whoever ended first."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started: list[asyncio.subprocess.Process] = []
    try:
        for program in programs[:-1]:
            started.append(await asyncio.create_subprocess_exec(*program["command"]))
        for program in programs[:-1]:
            await listening(program["port"])
        started.append(await asyncio.create_subprocess_exec(*programs[-1]["command"]))
        ends = [asyncio.create_task(one.wait()) for one in started]
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*ends, stopped], return_when=asyncio.FIRST_COMPLETED)
        return 0 if stopped in done else next(end.result() for end in ends if end.done())
    finally:
        for one in reversed(started):
            if one.returncode is None:
                one.terminate()
        await asyncio.gather(*(one.wait() for one in started))


async def listening(port: int) -> None:
    """Return once somebody listens there. Nobody tells us; we have to look."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(json.loads(Path(sys.argv[1]).read_text()))))
