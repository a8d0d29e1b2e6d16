"""The two ends of the proxy as bytes: what a client was answered, what a node was sent."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import h11
import orjson

BOUND_S = 30.0  #: only a hang takes longer
_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


@dataclass
class Answer:
    """One response."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def sentence(self) -> str:
        """What an error says, "" if it is in the shape of none of the three protocols."""
        if self.fields.get("content-type", "").startswith("text/plain"):
            return self.body.decode()
        said = orjson.loads(self.body)
        error = said.get("error") if isinstance(said, dict) else None
        return error["message"] if isinstance(error, dict) else error or ""

    @property
    def protocol(self) -> str:
        """The protocol whose error this is."""
        said = orjson.loads(self.body)
        return "anthropic" if "type" in said else "openai" if isinstance(said["error"], dict) else "native"


def answers(raw: bytes) -> list[Answer]:
    """The responses of a connection, in their order; bytes that are none of a response raise."""
    found: list[Answer] = []
    while raw:
        head, end, raw = raw.partition(b"\r\n\r\n")
        match = _HEAD.match(head)
        assert match and end, f"no response head: {head[:200]!r}"
        rows = (row.partition(":") for row in head.decode("latin-1").split("\r\n")[1:])
        fields = {name.lower(): value.strip() for name, _, value in rows}
        if fields.get("transfer-encoding") == "chunked":
            body, raw = _unchunk(raw)
        else:
            length = int(fields.get("content-length", "0"))
            body, raw = raw[:length], raw[length:]
            assert len(body) == length, f"cut off: {head!r} {body!r}"
        found.append(Answer(int(match[1]), fields, body))
    return found


def _unchunk(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, _, raw = raw.partition(b"\r\n")
        if int(size, 16) == 0:
            return body, raw.removeprefix(b"\r\n")
        body, raw = body + raw[: int(size, 16)], raw[int(size, 16) + 2 :]


@dataclass
class Conversation:
    """What came until the proxy ended the connection."""

    raw: bytes
    reset: bool = False

    @property
    def answers(self) -> list[Answer]:
        """The responses; a reset may have taken the last one's end."""
        return answers(self.raw)


async def converse(port: int, sent: bytes) -> Conversation:
    """Send bytes and read until the proxy ends the connection; one that it keeps open raises TimeoutError."""
    async with asyncio.timeout(BOUND_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        said = Conversation(b"")

        async def send() -> None:
            with suppress(ConnectionError):  # a refusal may end the connection before all is sent
                writer.write(sent)
                await writer.drain()

        sending = asyncio.create_task(send())
        try:
            while data := await reader.read(1 << 16):
                said.raw += data
        except ConnectionError:
            said.reset = True
        except TimeoutError as timeout:
            raise TimeoutError(f"still open after {said.raw!r}") from timeout
        finally:
            sending.cancel()
            writer.transport.abort()
    return said


@dataclass
class Tap:
    """A relay before a node that keeps every byte which the node is sent."""

    node_port: int
    port: int = 0
    sent: list[bytearray] = field(default_factory=list)

    @property
    def host_port(self) -> str:
        """Where the proxy finds the node."""
        return f"127.0.0.1:{self.port}"

    def forget(self) -> None:
        """Drop what was sent on connections so far; those that go on begin anew."""
        for piece in self.sent:
            piece.clear()

    def requests(self) -> list[tuple[str, str, bytes]]:
        """Method, target and body of what was sent, as a strict parser reads it."""
        return [request for piece in self.sent for request in read_strictly(bytes(piece))]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the proxy's."""
        kept = bytearray()
        self.sent.append(kept)
        node_reader, node_writer = await asyncio.open_connection("127.0.0.1", self.node_port)

        async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
            try:
                while data := await source.read(1 << 16):
                    if keep:
                        kept.extend(data)
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                sink.close()

        await asyncio.gather(relay(reader, node_writer, True), relay(node_reader, writer, False))


@asynccontextmanager
async def tapped(node_port: int) -> AsyncIterator[Tap]:
    """A tap before the node at ``node_port``."""
    tap = Tap(node_port)
    server = await asyncio.start_server(tap.serve, "127.0.0.1", 0)
    tap.port = server.sockets[0].getsockname()[1]
    try:
        yield tap
    finally:
        server.close()
        server.close_clients()
        await server.wait_closed()


#: In a head: a line end that is no CRLF, or a control character other than a tab.
_IRREGULAR = re.compile(rb"\r(?!\n)|(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r\n[ \t]")


def read_strictly(raw: bytes) -> list[tuple[str, str, bytes]]:
    """The requests in ``raw``; raises where two servers could read them differently."""
    found: list[tuple[str, str, bytes]] = []
    while raw:
        head, end, rest = raw.partition(b"\r\n\r\n")
        assert end, f"half a head: {head!r}"
        assert not _IRREGULAR.search(head), f"irregular head: {head!r}"
        names = [row.partition(b":")[0].lower() for row in head.split(b"\r\n")[1:]]
        for name in (b"host", b"content-length", b"transfer-encoding"):
            assert names.count(name) <= 1, f"{name!r} twice: {head!r}"
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1, head
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(head + end)
        request = connection.next_event()
        assert isinstance(request, h11.Request), head
        connection.receive_data(rest)
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage), f"half a body behind {head!r}: {event}"
        raw = connection.trailing_data[0]
        found.append((request.method.decode(), request.target.decode("latin-1"), body))
    return found
