"""A thin asynchronous client of one Ollama server.

It knows addresses, limits of time and what an error looks like. It follows no proxy of the environment: a
node is asked directly, or the answer would be that of the fleet.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
from pydantic import TypeAdapter
from pydantic_core import from_json
from yarl import URL

from agent.report import Model, Resident

CONNECT_TIMEOUT_S = 2.0

# /api/ps answers late while Ollama waits up to 5 s for freed memory (server/sched.go): that is no dead node.
ANSWER_TIMEOUT_S = 10.0

# A pull says something every few hundred milliseconds; a create can hash for minutes without a word.
IDLE_TIMEOUT_S = 300.0

# As much as Ollama's own client takes (api/client.go).
LONGEST_LINE_BYTES = 8 << 20

_MODELS = TypeAdapter(list[Model])
_RESIDENT = TypeAdapter(list[Resident])


class OllamaUnreachable(Exception):
    """No answer: refused, reset, no such host, or nothing within the time; the text says which."""


class OllamaError(Exception):
    """An answer that is an error, or that is none of Ollama's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def error_message(status: int, body: bytes) -> str:
    """Return what an error body says: Ollama's ``error``, OpenAI's ``error.message``, or its first line."""
    try:
        error = from_json(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        lines = body.decode(errors="replace").strip().splitlines()
        return lines[0][:200] if lines else f"status {status} without a body"


def split_lines(received: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete lines of what was received, blank ones left out, and the beginning of the next."""
    *lines, rest = received.split(b"\n")
    return [line for line in lines if line.strip()], rest


def parse_tags(body: bytes) -> list[Model]:
    """Return the rows of an ``/api/tags`` body; raise OllamaError if it is none."""
    return _rows(_MODELS, body, "/api/tags")


def parse_ps(body: bytes) -> list[Resident]:
    """Return the rows of an ``/api/ps`` body; raise OllamaError if it is none."""
    return _rows(_RESIDENT, body, "/api/ps")


class OllamaClient:
    """One server and the connections to it. Made inside a running loop; closed with ``async with``.

    Raises ValueError with a sentence for an address that is none. Paths are given without a query.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.url = _address(url)
        self._connect_timeout_s = connect_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._session = aiohttp.ClientSession(
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            raise_for_status=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; what is still being read ends with OllamaUnreachable."""
        await self._session.close()

    async def version(self) -> str:
        """Return the server's version, such as ``0.33.0``; raises as :meth:`request`."""
        body = await self.request("GET", "/api/version")
        try:
            return str(from_json(body)["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise OllamaError(200, "/api/version is not an answer of Ollama") from error

    async def tags(self) -> list[Model]:
        """Return the models that the server has on disk; raises as :meth:`request`."""
        return parse_tags(await self.request("GET", "/api/tags"))

    async def ps(self) -> list[Resident]:
        """Return the models that the server holds in memory; raises as :meth:`request`."""
        return parse_ps(await self.request("GET", "/api/ps"))

    async def show(self, model: str, *, verbose: bool = False) -> dict[str, Any]:
        """Return everything about one model, as ``/api/show`` gives it; raises as :meth:`request`."""
        body = await self.request("POST", "/api/show", json={"model": model, "verbose": verbose})
        try:
            found = from_json(body)
        except ValueError as error:
            raise OllamaError(200, "/api/show is not an answer of Ollama") from error
        if not isinstance(found, dict):
            raise OllamaError(200, "/api/show is not an answer of Ollama")
        return found

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return the whole body of a successful answer.

        ``timeout_s`` bounds everything, from connecting to the last byte (default: the client's). Raises
        OllamaUnreachable without an answer and OllamaError for any status but 2xx.
        """
        total = self._answer_timeout_s if timeout_s is None else timeout_s
        limits = aiohttp.ClientTimeout(total=total, sock_connect=self._connect_timeout_s)
        async with self._asked(method, path, json, headers, limits) as answer:
            return await answer.read()

    async def stream(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the objects of an NDJSON answer as they come; closing the iterator hangs up.

        An ``{"error": …}`` within the stream is yielded like any other object. Raises OllamaUnreachable where
        the answer breaks off or stays silent for ``idle_timeout_s``, OllamaError for any status but 2xx and
        for a line that is no JSON object.
        """
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=self._connect_timeout_s, sock_read=idle_timeout_s
        )
        async with self._asked(method, path, json, headers, limits) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                lines, rest = split_lines(rest + chunk)
                for line in lines:
                    yield _object(path, line)
                if len(rest) > LONGEST_LINE_BYTES:
                    raise OllamaError(200, f"{path} sent a line longer than {LONGEST_LINE_BYTES} bytes")
            if rest.strip():
                yield _object(path, rest)

    @asynccontextmanager
    async def _asked(
        self,
        method: str,
        path: str,
        json: Any,
        headers: Mapping[str, str] | None,
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(
                method,
                self.url / path.lstrip("/"),
                json=json,
                headers=headers,
                timeout=limits,
                allow_redirects=False,
            ) as answer:
                if answer.status >= 300:
                    raise OllamaError(answer.status, error_message(answer.status, await answer.read()))
                yield answer
        except TimeoutError as error:
            raise OllamaUnreachable(f"{self.url} did not answer {path} in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise OllamaUnreachable(f"{self.url} cannot be reached: {_reason(error)}") from error


def _address(text: str) -> URL:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"Ollama's address must look like http://127.0.0.1:11434, not {text!r}")
    return url


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _object(path: str, line: bytes) -> dict[str, Any]:
    try:
        found = from_json(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OllamaError(200, f"{path} sent a line that is no JSON object: {line[:80]!r}")
    return found


def _rows[T](adapter: TypeAdapter[list[T]], body: bytes, path: str) -> list[T]:
    try:
        # Go writes an empty list as null.
        return adapter.validate_python(from_json(body)["models"] or [])
    except (ValueError, KeyError, TypeError) as error:
        raise OllamaError(200, f"{path} is not an answer of Ollama") from error
