"""Well-framed bodies that no node may have to read."""

from __future__ import annotations

import zstandard

from tests.hostile.forms import BODY, LAST, MIB, Attack, post, sized


def _deep(opening: bytes, closing: bytes, depth: int = 100_000) -> bytes:
    return b'{"model":"llama3.2","messages":' + opening * depth + closing * depth + b"}"


def _bomb(megabytes: int = 1024) -> bytes:
    """A zstd frame of a few dozen kB that becomes ``megabytes``."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(MIB)
    return b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()


def _spoken(model: bytes) -> bytes:
    return b'{"model":' + model + b',"stream":false,"messages":[{"role":"user","content":"a"}]}'


ZSTD = "Content-Encoding: zstd"
#: Bodies that are well framed.
BODIES = (
    Attack("lists nested 100,000 deep", sized(_deep(b"[", b"]")) + LAST, (400, 200)),
    Attack(
        "objects nested 100,000 deep",
        sized(_deep(b'{"a":', b"}").replace(b":}", b":1}", 1)) + LAST,
        (400, 200),
    ),
    Attack("lists nested 100,000 deep, unclosed", sized(b"[" * 100_000) + LAST, (400, 200)),
    Attack("not UTF-8", sized(_spoken(b'"llama\xff"')) + LAST, (400, 200)),
    Attack("overlong UTF-8", sized(_spoken(b'"llama3.2\xc0\xaf"')) + LAST, (400, 200)),
    Attack("a surrogate in UTF-8", sized(_spoken(b'"llama3.2\xed\xa0\x80"')) + LAST, (400, 200)),
    Attack("a lone surrogate, escaped", sized(_spoken(rb'"llama3.2\ud800"')) + LAST, (400, 200)),
    Attack("UTF-16", sized(BODY.decode().encode("utf-16")) + LAST, (400, 200)),
    Attack("a byte order mark", sized(b"\xef\xbb\xbf" + BODY) + LAST, (400, 200)),
    Attack("NaN", sized(BODY[:-1] + b',"options":{"temperature":NaN}}') + LAST, (400, 200)),
    Attack("Infinity", sized(BODY[:-1] + b',"options":{"num_ctx":Infinity}}') + LAST, (400, 200)),
    Attack("1e999", sized(BODY[:-1] + b',"options":{"num_ctx":1e999}}') + LAST, (400, 200)),
    Attack(
        "a number of a megabyte",
        sized(BODY[:-1] + b',"options":{"num_ctx":' + b"9" * MIB + b"}}") + LAST,
        (400, 200),
    ),
    Attack("a second object behind the first", sized(BODY + BODY) + LAST, (400, 200)),
    Attack("NUL behind the object", sized(BODY + b"\x00") + LAST, (400, 200)),
    Attack("a comment", sized(b"/* x */" + BODY) + LAST, (400, 200)),
    Attack("a second model in capitals", sized(BODY[:-1] + b',"MODEL":"other"}') + LAST, (400, 200)),
    Attack(
        "a second model with a long s",
        sized(BODY[:-1] + ',"me\u017f\u017fage\u017f":[]}'.encode()) + LAST,
        (400, 200),
    ),
    Attack("a list for an object", sized(b"[1]") + LAST, (400, 200)),
    Attack("a model that is a path", sized(_spoken(b'"../../etc/passwd"')) + LAST, (400, 200)),
    Attack("a model of a megabyte", sized(_spoken(b'"' + b"a" * MIB + b'"')) + LAST, (400, 200)),
    Attack("a model with a line end", sized(_spoken(rb'"llama3.2\r\nX-Injected: 1"')) + LAST, (400, 200)),
    Attack("broken JSON, OpenAI", sized(b"{", "/v1/chat/completions") + LAST, (400, 200), protocol="openai"),
    Attack("broken JSON, Anthropic", sized(b"{", "/v1/messages") + LAST, (400, 200), protocol="anthropic"),
    Attack("a zstd bomb", sized(_bomb(), "/v1/chat/completions", ZSTD) + LAST, (413, 200), protocol="openai"),
    Attack(
        "a zstd bomb, Anthropic",
        sized(_bomb(), "/v1/messages", ZSTD) + LAST,
        (413, 200),
        protocol="anthropic",
    ),
    Attack(
        "a zstd bomb of many frames",
        sized(_bomb(1) * 64, "/v1/chat/completions", ZSTD) + LAST,
        (413, 200),
        protocol="openai",
    ),
    Attack(
        "broken zstd",
        sized(b"\x28\xb5\x2f\xfd broken", "/v1/chat/completions", ZSTD) + LAST,
        (400, 200),
        protocol="openai",
    ),
    Attack(
        "half of zstd",
        sized(zstandard.compress(BODY)[:-5], "/v1/chat/completions", ZSTD) + LAST,
        (400, 200),
        protocol="openai",
    ),
    Attack(
        "a zstd window of 2 GiB",
        sized(b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00", "/v1/chat/completions", ZSTD) + LAST,
        (400, 200),
        protocol="openai",
    ),
    *(
        Attack(
            f"content-encoding {coding}, {path}",
            sized(b"\x1f\x8b", path, f"Content-Encoding: {coding}") + LAST,
            (415, 200),
            protocol=protocol,
        )
        for path, protocol in (
            ("/api/chat", "native"),
            ("/v1/chat/completions", "openai"),
            ("/v1/messages", "anthropic"),
        )
        for coding in ("gzip", "deflate", "br", "zstd, gzip")
    ),
    Attack(
        "zstd, which the native API does not take",
        sized(zstandard.compress(BODY), "/api/chat", ZSTD) + LAST,
        (415, 200),
    ),
    Attack("a body announced larger than the limit", post("Content-Length: 999999999"), (413,)),
)
