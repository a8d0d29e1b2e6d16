"""Model names as Ollama reads them: ``[host/][namespace/]model[:tag]``.

Ollama matches names without regard to case and fills what is missing with
``registry.ollama.ai/library/…:latest``, so ``Llama3.2``, ``llama3.2:latest`` and
``registry.ollama.ai/library/llama3.2:latest`` are one model. Whoever compares names compares
:func:`canonical`; whoever shows one shows :func:`display`; whoever answers a client echoes the client's own
string. Source: ``types/model/name.go`` and ``internal/modelref/modelref.go`` of Ollama v0.33.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

#: All parts at their longest make 593; who sends more means no model, and shall not fill caches and logs.
LONGEST = 1024

_CLOUD = "cloud"
_LOCAL = "local"
_CLOUD_SUFFIX = "-cloud"

# Part → (what it may look like, its longest length). Only a host may hold a colon (its port), and a
# namespace no dot: it would be mistaken for a host.
_PARTS = {
    "host": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*"), 350),
    "namespace": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*"), 80),
    "model": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"), 80),
    "tag": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*"), 80),
}


@dataclass(frozen=True, slots=True)
class Name:
    """A complete, valid model name in the case in which it was written."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def key(self) -> str:
        """The full name in lower case: equal for exactly those names that Ollama takes for the same."""
        return str(self).lower()

    @property
    def display(self) -> str:
        """The short form that Ollama prints: defaults for host and namespace left out, the tag kept."""
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{short}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{short}"
        return short


@lru_cache(maxsize=4096)
def parse(name: str) -> Name:
    """Return the complete name that a client means by ``name``.

    A ``:local`` suffix is dropped, for it only forbids the cloud; ``model:tag:cloud`` becomes
    ``model:tag-cloud``, the name under which a node lists it. Raises ValueError with a sentence for the
    client where Ollama would refuse the name.
    """
    if len(name) > LONGEST:
        raise ValueError(f"invalid model name {name[:40] + '…'!r}: longer than {LONGEST} characters")
    text = name.strip()
    if not text:
        raise ValueError("model is required")
    rest, tag = _split_tag(_without_source(text))
    parts = [DEFAULT_HOST, DEFAULT_NAMESPACE]
    path = rest.rsplit("/", 2)
    if len(path) == 3:
        # A name may be pasted as an address: https://host/namespace/model.
        path[0] = path[0].partition("://")[2] if "://" in path[0] else path[0]
    parts[3 - len(path) :] = path
    found = Name(parts[0], parts[1], parts[2], DEFAULT_TAG if tag is None else tag)
    _check(text, found)
    return found


@lru_cache(maxsize=4096)
def canonical(name: str) -> str:
    """Return the key under which ``name`` is compared: the full name in lower case; raises as ``parse``."""
    return parse(name).key


@lru_cache(maxsize=4096)
def display(name: str) -> str:
    """Return the short form of ``name`` as Ollama prints it (``gemma3:270m``); raises as ``parse``."""
    return parse(name).display


def is_cloud(name: str) -> bool:
    """Return whether ``name`` asks for ollama.com's hardware (``:cloud`` or ``:…-cloud``); never raises."""
    return _source(name.strip()) == _CLOUD


def _source(text: str) -> str | None:
    suffix = text.rpartition(":")[2].lower() if ":" in text else ""
    if suffix in (_CLOUD, _LOCAL):
        return suffix
    return _CLOUD if suffix.endswith(_CLOUD_SUFFIX) and "/" not in suffix else None


def _without_source(text: str) -> str:
    base, _, suffix = text.rpartition(":")
    if not base or suffix.lower() not in (_CLOUD, _LOCAL):
        return text
    if _source(base) is not None:
        raise ValueError(f"invalid model name {text!r}: use either :local or :cloud, and only once")
    if suffix.lower() == _LOCAL:
        return base
    return base + _CLOUD_SUFFIX if _split_tag(base)[1] is not None else text


def _split_tag(text: str) -> tuple[str, str | None]:
    # A colon before the last slash belongs to the host's port.
    slash, colon = text.rfind("/"), text.rfind(":")
    return (text[:colon], text[colon + 1 :]) if colon > slash else (text, None)


def _check(text: str, name: Name) -> None:
    for part, (allowed, longest) in _PARTS.items():
        value = getattr(name, part)
        if not value:
            raise ValueError(f"invalid model name {text!r}: the {part} is empty")
        if len(value) > longest:
            raise ValueError(f"invalid model name {text!r}: the {part} is longer than {longest} characters")
        if not allowed.fullmatch(value):
            raise ValueError(f"invalid model name {text!r}: {value!r} is not a valid {part}")
