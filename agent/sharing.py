"""A proxy's connection to what all proxies have in flight here: it tells its own and hears the others'.

Both sides of a WebSocket speak when something has changed, and then not again for :data:`~in_flight.PACE_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import orjson
from aiohttp import WSCloseCode, WSMsgType
from pydantic import ValidationError

from agent import in_flight
from agent.in_flight import PACE_S, PATCH, Member, Shares, TooMany


class Socket(Protocol):
    """What is used of a WebSocket, on either side."""

    def __aiter__(self) -> AsyncIterator[Any]:
        """Messages, until it is closed."""
        ...

    async def send_str(self, data: str) -> None:
        """Send a message."""
        ...

    async def close(self, *, code: int = ..., message: bytes = ...) -> Any:
        """Close it, and say why."""
        ...


async def attend(socket: Socket, shares: Shares, name: str, clock: Callable[[], float]) -> None:
    """Serve one proxy for as long as it is connected."""
    changed = asyncio.Event()
    member = shares.join(name, changed.set)
    teller = asyncio.create_task(_tell(socket, member, changed, clock), name=f"tell {name}")
    try:
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"messages are JSON texts")
                break
            member.tell(PATCH.validate_json(message.data), clock())
    except ValidationError as error:
        await socket.close(code=WSCloseCode.INVALID_TEXT, message=_why(error))
    except TooMany as error:
        await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=str(error).encode())
    finally:
        teller.cancel()
        member.leave()


async def _tell(socket: Socket, member: Member, changed: asyncio.Event, clock: Callable[[], float]) -> None:
    while True:
        await changed.wait()
        changed.clear()
        if member.replaced:
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"it has connected again")
            return
        news = member.take(clock())
        try:
            await socket.send_str(
                orjson.dumps({"others": news.others, "rows": in_flight.dumped(news.rows)}).decode()
            )
        except ConnectionError:
            return  # it is gone: whoever reads from it ends
        await asyncio.sleep(PACE_S)


def _why(error: ValidationError) -> bytes:
    """A close reason has 123 bytes."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"broken at {where}: {first['msg']}".encode()[:123]
