"""What a prompt begins with, as a chain of keyed hashes: enough to tell which node has evaluated it before.

Each link stands for the prompt from its start to a boundary: the end of a message, or a place within a long
one. Two prompts share their beginning up to the last link that they have in common. Places within a message
depend on what is before them only, at steps that grow with the distance, so that a shared document is
recognised whatever follows it. Hashes are keyed with random bytes of this process: they tell nothing of the
text, not even by comparison with a known one, and are worth nothing elsewhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from proxy_addon.prompt import Part

#: Growing prefixes of a prompt, the shortest first: keyed hash of all up to there, and its estimated tokens.
Prefix = tuple[tuple[bytes, int], ...]

CHUNK_BYTES = 1024  #: the shortest step within a message, about 256 tokens: less is not worth a longer wait
FIRST_LINKS, LAST_LINKS = 16, 48  #: what is kept of a longer chain: a shared beginning, and a growing end
SAMPLE = 4096  #: characters at either end by which an image is known, beside its length
DIGEST_BYTES = 16

_KEY = secrets.token_bytes(32)


def key() -> bytes:
    """What the hashes are keyed with."""
    return _KEY


def use_key(of: bytes) -> None:
    """Make hashes as the process does whose key ``of`` is."""
    global _KEY
    _KEY = of


def prefix_of(parts: Iterable[Part]) -> Prefix:
    """The chain of the prompt that consists of ``parts``."""
    chain = blake2b(key=_KEY, digest_size=DIGEST_BYTES)
    links: list[tuple[bytes, int]] = []
    before = 0.0
    for part in parts:
        text = part.texts[0] if len(part.texts) == 1 else "\0".join(part.texts)
        head = part.role if not part.media else "\0".join((part.role, *map(_sample, part.media)))
        # Lengths come last: so no text can pass for two, and what is within does not depend on what follows.
        data = f"{head}\0{text}\0{len(head)} {len(text)}".encode(errors="surrogatepass")
        chain.update(_within(chain, data, before, part.tokens, links) if len(data) > CHUNK_BYTES else data)
        before += part.tokens
        links.append((chain.digest(), int(before)))
    if len(links) > FIRST_LINKS + LAST_LINKS:
        del links[FIRST_LINKS:-LAST_LINKS]
    return tuple(links)


def _within(
    chain: blake2b, data: bytes, before: float, tokens: float, links: list[tuple[bytes, int]]
) -> memoryview:
    """Add the links of places within a long part; returns what is left of its ``data``.

    The steps are an eighth to a sixteenth of the way so far.
    """
    view, at = memoryview(data), 0
    while (end := at + max(CHUNK_BYTES, 1 << max(at.bit_length() - 4, 0))) < len(view):
        chain.update(view[at:end])
        links.append((chain.digest(), int(before + tokens * end / len(view))))
        at = end
    return view[at:]


def _sample(medium: Any) -> str:
    """What tells an image from others, without reading megabytes."""
    part = Part("")
    part.add(medium | {"type": None} if isinstance(medium, dict) else medium)
    text = "".join(part.texts)
    return f"{len(text)} {text[:SAMPLE]} {text[-SAMPLE:]}"
