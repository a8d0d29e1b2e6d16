"""Which browser pages may ask, and the headers that tell them so: pure functions.

The defaults are those of Ollama v0.33 (``envconfig.AllowedOrigins``), the order of checks that of its
middleware (gin-contrib/cors). Different from Ollama: a preflight is granted whatever headers it asks for,
where Ollama lists them; who is refused is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

LOCAL_HOSTS = ("localhost", "127.0.0.1", "0.0.0.0")
APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
DEFAULT_ORIGINS: tuple[str, ...] = (
    *(
        f"{scheme}://{host}{port}"
        for host in LOCAL_HOSTS
        for scheme in ("http", "https")
        for port in ("", ":*")
    ),
    *(f"{scheme}://*" for scheme in APP_SCHEMES),
)

METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
MAX_AGE_S = 12 * 3600  # gin-contrib/cors' default


def same_origin(origin: str, host: str) -> bool:
    """Whether a page of ``origin`` was served under the very Host that it now asks."""
    return origin in (f"http://{host}", f"https://{host}")


@lru_cache(maxsize=1024)
def admitted(origin: str, patterns: Sequence[str]) -> bool:
    """Whether one of ``patterns`` matches ``origin``; a pattern may hold one ``*``, for any text."""
    return any(_matches(origin, pattern) for pattern in patterns)


def _matches(origin: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    if not star:
        return origin == pattern
    return len(origin) >= len(head) + len(tail) and origin.startswith(head) and origin.endswith(tail)


def answer_headers(origin: str, exposed: str) -> dict[str, str]:
    """What an answer to a page of an admitted ``origin`` carries; it may read the headers ``exposed``."""
    return {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": exposed,
        "vary": "Origin",
    }


def preflight_headers(origin: str, asked: str) -> dict[str, str]:
    """What the answer to a preflight carries; ``asked`` is its Access-Control-Request-Headers."""
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": asked,
        "access-control-max-age": str(MAX_AGE_S),
        "vary": "Origin, Access-Control-Request-Headers",
    }
