"""One look at one source of a node, and what its answer means. Nothing here remembers anything."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import orjson
from pydantic import ValidationError
from yarl import URL

from agent.report import SCHEMA_VERSION, Report

Http = Callable[[], aiohttp.ClientSession]

#: More than any list of models or report is: a wrong address must not fill the memory.
LONGEST_ANSWER_BYTES = 32 << 20

LOOP = 508  #: how a proxy answers what it has sent itself (``access.loop``)


class PollFailed(Exception):
    """No usable answer. The text completes "NODE …"; ``at_once``: no second try would fare better."""

    def __init__(self, reason: str, at_once: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at_once = at_once


class ReportTooNew(PollFailed):
    """The agent's report is of a schema later than this proxy can read."""


async def fetch(
    http: Http,
    url: URL,
    timeout_s: float,
    *,
    headers: Mapping[str, str] | None = None,
    json: Any = None,
) -> bytes:
    """Return the body of a 200 answer to GET (POST where there is ``json``).

    Raises:
        PollFailed: without an answer within ``timeout_s`` (from connecting to the last byte), and for any
            other status.
    """
    method = "GET" if json is None else "POST"
    headers = {"Accept-Encoding": "identity", **(headers or {})}
    limits = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with http().request(
            method, url, headers=headers, json=json, timeout=limits, allow_redirects=False
        ) as answer:
            if answer.status == LOOP:
                raise PollFailed("is this proxy itself under another address", at_once=True)
            if answer.status != 200:
                raise PollFailed(f"answered {url.path} with status {answer.status}")
            return await _read(answer, url)
    except TimeoutError as error:
        raise PollFailed(f"did not answer {url.path} within {timeout_s:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise PollFailed(*_reason(error)) from error


async def _read(answer: aiohttp.ClientResponse, url: URL) -> bytes:
    parts = []
    size = 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > LONGEST_ANSWER_BYTES:
            raise PollFailed(f"answered {url.path} with more than {LONGEST_ANSWER_BYTES} bytes")
    return b"".join(parts)


def _reason(error: Exception) -> tuple[str, bool]:
    """Why there was no answer, and whether that is certain at once."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    number = getattr(cause, "errno", None)
    if number == errno.ECONNREFUSED:
        return "refused the connection", True
    if number in (errno.ECONNRESET, errno.EPIPE) or isinstance(cause, aiohttp.ServerDisconnectedError):
        return "closed the connection without an answer", False
    text = (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).rstrip(".")
    return f"cannot be reached ({text})", False


def parse_version(body: bytes) -> str:
    """Return the version in an ``/api/version`` answer; raise PollFailed if it is none."""
    try:
        return str(orjson.loads(body)["version"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise PollFailed("answered /api/version as no Ollama does") from error


def parse_report(body: bytes) -> Report:
    """Return an agent's report without the rows of its models, which are asked of Ollama directly.

    Raises:
        PollFailed: if it is no report, or one of a later schema than this proxy reads.
    """
    try:
        found = orjson.loads(body)
        version = int(found["schema_version"])
        ollama = found["ollama"]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise PollFailed("sent something that is no report") from error
    if version > SCHEMA_VERSION:
        raise ReportTooNew(
            f"speaks report schema {version}, but this proxy reads no later one than {SCHEMA_VERSION}:"
            " update SOLLOL on the proxy's machine"
        )
    if isinstance(ollama, dict):
        # Validating the rows of fifty models every second costs more than everything else in a report.
        ollama["models"] = ollama["resident"] = []
    try:
        return Report.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PollFailed(f"sent a report that is broken at {where}: {first['msg']}") from error
