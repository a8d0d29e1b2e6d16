"""A client of bytes, for tests that look at what really comes over the wire."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

Ending = Literal["fin", "rst", "complete"]


def request_bytes(path: str, body: object = None, method: str | None = None, **headers: str) -> bytes:
    """Return an HTTP/1.1 request; ``body`` is JSON unless it is bytes."""
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Length": str(len(payload))}
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = [f"{method or ('POST' if payload else 'GET')} {path} HTTP/1.1"]
    head += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*head, "", ""]).encode() + payload


@dataclass
class Answer:
    """What came: the raw bytes, how it ended, and the parts that could be read of it."""

    raw: bytes
    ending: Ending
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    body: bytes = b""

    @property
    def lines(self) -> list[Any]:
        """The chunks as JSON lines."""
        return [json.loads(chunk) for chunk in self.chunks]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def parse(raw: bytes, ending: Ending) -> Answer:
    """Return what can be read of a response, whole or cut off."""
    answer = Answer(raw, ending)
    head, separator, rest = raw.partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"HTTP/1.1 "):
        return answer
    status, *fields = head.decode("latin-1").split("\r\n")
    answer.status = int(status.split(" ")[1])
    answer.headers = {k.lower(): v.strip() for k, _, v in (f.partition(":") for f in fields)}
    if answer.headers.get("transfer-encoding") != "chunked":
        answer.body = rest
        return answer
    while rest:
        size_text, separator, rest = rest.partition(b"\r\n")
        if not re.fullmatch(rb"[0-9a-fA-F]+", size_text):
            break
        size = int(size_text, 16)
        if not separator or len(rest) < size + 2 or size == 0:
            if separator and size == 0 and rest == b"\r\n":
                answer.ending = "complete"
            break
        answer.chunks.append(rest[:size])
        rest = rest[size + 2 :]
    answer.body = b"".join(answer.chunks)
    return answer


async def ask(host_port: str, sent: bytes) -> Answer:
    """Send bytes on a connection of their own and return what came until the node ended or completed it."""
    host, port = host_port.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw, ending = b"", "fin"
    try:
        writer.write(sent)
        while True:
            data = await reader.read(1 << 16)
            if not data:
                break
            raw += data
            answer = parse(raw, "fin")
            length = answer.headers.get("content-length")
            if answer.ending == "complete":
                return answer
            if length is not None and len(answer.body) == int(length) and sent[:5] != b"HEAD ":
                answer.ending = "complete"
                return answer
            if answer.status and sent[:5] == b"HEAD ":
                answer.ending = "complete"
                return answer
    except ConnectionResetError:
        ending = "rst"
    finally:
        writer.close()
    return parse(raw, "rst" if ending == "rst" else "fin")
