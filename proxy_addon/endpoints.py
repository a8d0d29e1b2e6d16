"""Ollama's surface as data: every route, the protocol it speaks and who handles it.

The table follows Ollama v0.33 ``server/routes.go``. :func:`match` is its only reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Protocol = Literal["native", "openai", "anthropic"]


class Handling(StrEnum):
    """What a fleet in the role of one server does with a request."""

    ANSWER = "answer"  #: from the fleet's state, no node is asked
    ROUTE = "route"  #: to the node that finishes first: inference, one placement each
    ANY = "any"  #: to any node that holds the model: cheap metadata
    FAN_OUT = "fan_out"  #: to several nodes at once, their answers merged
    STICKY = "sticky"  #: to the node that the parts of one create were sent to
    PIN = "pin"  #: to the one node that is signed in


class Task(StrEnum):
    """What kind of work a routed request is, hence which speeds predict it."""

    GENERATE = "generation"
    EMBED = "embedding"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route. ``path`` ends in ``/*`` where the last segments are a parameter."""

    path: str
    methods: frozenset[str]
    protocol: Protocol
    handling: Handling
    task: Task = Task.NONE
    stream_default: bool = False


def _e(
    methods: str,
    path: str,
    protocol: Protocol,
    handling: Handling,
    task: Task = Task.NONE,
    stream: bool = False,
) -> Endpoint:
    return Endpoint(path, frozenset(methods.split()), protocol, handling, task, stream)


ENDPOINTS: tuple[Endpoint, ...] = (
    _e("GET HEAD", "/", "native", Handling.ANSWER),
    _e("GET HEAD", "/api/version", "native", Handling.ANSWER),
    _e("GET", "/api/status", "native", Handling.ANSWER),
    _e("GET HEAD", "/api/tags", "native", Handling.ANSWER),
    _e("GET", "/api/ps", "native", Handling.ANSWER),
    _e("POST", "/api/show", "native", Handling.ANY),
    _e("POST", "/api/generate", "native", Handling.ROUTE, Task.GENERATE, stream=True),
    _e("POST", "/api/chat", "native", Handling.ROUTE, Task.GENERATE, stream=True),
    _e("POST", "/api/embed", "native", Handling.ROUTE, Task.EMBED),
    _e("POST", "/api/embeddings", "native", Handling.ROUTE, Task.EMBED),
    _e("POST", "/api/pull", "native", Handling.FAN_OUT, stream=True),
    _e("DELETE", "/api/delete", "native", Handling.FAN_OUT),
    _e("POST", "/api/copy", "native", Handling.FAN_OUT),
    _e("POST", "/api/create", "native", Handling.STICKY, stream=True),
    _e("HEAD POST", "/api/blobs/*", "native", Handling.STICKY),
    _e("POST", "/api/push", "native", Handling.PIN, stream=True),
    _e("POST", "/api/me", "native", Handling.PIN),
    _e("POST", "/api/signout", "native", Handling.PIN),
    _e("DELETE", "/api/user/keys/*", "native", Handling.PIN),
    _e("POST", "/api/experimental/web_search", "native", Handling.PIN),
    _e("POST", "/api/experimental/web_fetch", "native", Handling.PIN),
    _e("GET", "/api/experimental/model-recommendations", "native", Handling.PIN),
    _e("GET", "/v1/models", "openai", Handling.ANSWER),
    _e("GET", "/v1/models/*", "openai", Handling.ANY),
    _e("POST", "/v1/chat/completions", "openai", Handling.ROUTE, Task.GENERATE),
    _e("POST", "/v1/completions", "openai", Handling.ROUTE, Task.GENERATE),
    _e("POST", "/v1/embeddings", "openai", Handling.ROUTE, Task.EMBED),
    _e("POST", "/v1/responses", "openai", Handling.ROUTE, Task.GENERATE),
    _e("POST", "/v1/audio/transcriptions", "openai", Handling.ROUTE, Task.GENERATE),
    _e("POST", "/v1/messages", "anthropic", Handling.ROUTE, Task.GENERATE),
)

_EXACT = {e.path: e for e in ENDPOINTS if not e.path.endswith("/*")}
_PREFIX = tuple((e.path[:-1], e) for e in ENDPOINTS if e.path.endswith("/*"))


def match(path: str) -> Endpoint | None:
    """The endpoint that ``path`` (no query) names, whatever the method; None if Ollama has no such route.

    A trailing slash is tolerated where Ollama would redirect to the path without it: clients do not
    follow a redirected POST alike, and the meaning is clear.
    """
    if found := _EXACT.get(path) or _EXACT.get(path.rstrip("/")):
        return found
    for prefix, endpoint in _PREFIX:
        if path.startswith(prefix) and len(path) > len(prefix):
            return endpoint
    return None


def protocol_of(path: str) -> Protocol:
    """The protocol whose error shape a client of ``path`` expects, for unknown paths too."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "native"
