"""Errors in the shape of the protocol that was spoken (Ollama, OpenAI, Anthropic).

Shapes and type names: Ollama v0.33 ``middleware/openai.go`` and ``middleware/anthropic.go``, and the
published error formats of the two APIs for what Ollama never sends itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from mitmproxy import http

from proxy_addon.access import Refusal
from proxy_addon.endpoints import Protocol

_OPENAI_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}

OWN_FAULT = "SOLLOL failed while it handled this request"  #: how :func:`own_fault` begins


def body(protocol: Protocol, status: int, message: str, request_id: str = "") -> dict[str, Any]:
    """The error as the JSON object that a client of ``protocol`` expects for HTTP ``status``."""
    if protocol == "openai":
        kind = _OPENAI_TYPE.get(status, "api_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    if protocol == "anthropic":
        kind = _ANTHROPIC_TYPE.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return {"error": message}


def response(
    protocol: Protocol,
    status: int,
    message: str,
    *,
    request_id: str = "",
    headers: Mapping[str, str] | None = None,
) -> http.Response:
    """A whole HTTP response that says ``message``; ``headers`` (``Retry-After`` …) are added."""
    made = http.Response.make(
        status,
        orjson.dumps(body(protocol, status, message, request_id)),
        {"content-type": "application/json; charset=utf-8"},
    )
    if request_id:
        made.headers["x-sollol-request-id"] = request_id
    for name, value in (headers or {}).items():
        made.headers[name] = value
    return made


def refused(protocol: Protocol, refusal: Refusal, request_id: str = "") -> http.Response:
    """The answer to what goes no further for the reason in ``refusal``."""
    return response(protocol, refusal.status, refusal.message, request_id=request_id, headers=refusal.headers)


def internal(protocol: Protocol, request_id: str) -> http.Response:
    """The answer where SOLLOL itself failed; the traceback is in the log under ``request_id``."""
    return response(protocol, 500, own_fault(request_id), request_id=request_id)


def own_fault(request_id: str) -> str:
    """What is said where SOLLOL itself failed."""
    return f"{OWN_FAULT}; its log says why (request id {request_id})"


def plain(status: int, text: str) -> http.Response:
    """The text/plain answer that Ollama's router gives for 404 and 405."""
    return http.Response.make(status, text, {"content-type": "text/plain"})


def stream_tail(protocol: Protocol, message: str, request_id: str = "") -> bytes:
    """The bytes that end a stream which has begun but cannot be finished, so that the client's SDK raises.

    Native: a last ``{"error"}`` line, as Ollama writes it. OpenAI: a ``data:`` event whose object has
    ``error`` (the SDKs raise on it) and no ``[DONE]``. Anthropic: an ``error`` event, no ``message_stop``.
    """
    encoded = orjson.dumps(body(protocol, 500, message, request_id))
    if protocol == "openai":
        return b"data: " + encoded + b"\n\n"
    if protocol == "anthropic":
        return b"event: error\ndata: " + encoded + b"\n\n"
    return encoded + b"\n"
